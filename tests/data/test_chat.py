"""The loss mask covers exactly the text that the target generates, for seven kinds of chat template."""

from __future__ import annotations

import numpy as np
import pytest

from eagle_ds.data.chat import ChatEncoder
from eagle_ds.data.shapes import messages_of, record_id
from eagle_ds.data.template import common_prefix, common_suffix
from tests.tiny_targets import byte_tokenizer

CHAT = [
    {"role": "user", "content": "Sum of 2 and 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And ans?"},
    {"role": "assistant", "content": "answers vary:\n\n- one\n- answer"},
]


class SlowTokenizer:
    """A tokenizer written in Python, such as Kimi's: it gives no character offsets."""

    is_fast = False

    def __init__(self, fast) -> None:
        self._fast = fast

    def __getattr__(self, name: str):
        return getattr(self._fast, name)

    def __call__(self, text: str, **settings):
        if settings.get("return_offsets_mapping"):
            raise NotImplementedError
        return self._fast(text, **settings)


def encoder_of(kind: str, max_length: int = 4096, **settings) -> ChatEncoder:
    return ChatEncoder(byte_tokenizer(kind), max_length, **settings)


def trained_text(encoder: ChatEncoder, messages: list[dict]) -> list[str]:
    """Return the decoded text of every trained span."""
    encoded = encoder.encode({"messages": messages})
    return [encoder.tokenizer.decode(encoded.input_ids[start:end]) for start, end in encoded.trained_spans]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("chatml", ["It is 4.<|im_end|>", "answers vary:\n\n- one\n- answer<|im_end|>"]),
        ("llama3", ["It is 4.<|eot_id|>", "answers vary:\n\n- one\n- answer<|eot_id|>"]),
        (
            "qwen3",
            ["It is 4.<|im_end|>", "<think>\n\n</think>\n\nanswers vary:\n\n- one\n- answer<|im_end|>"],
        ),
        (
            "deepseek",
            ["It is 4.<｜end▁of▁sentence｜>", "answers vary:\n\n- one\n- answer<｜end▁of▁sentence｜>"],
        ),
        (
            "harmony",
            [
                "<|channel|>final<|message|>It is 4.<|end|>",
                "<|channel|>final<|message|>answers vary:\n\n- one\n- answer<|return|>",
            ],
        ),
        ("mistral", ["It is 4.</s>", "answers vary:\n\n- one\n- answer</s>"]),
        ("plain", ["It is 4.", "answers vary:\n\n- one\n- answer"]),
    ],
)
def test_trained_text_is_what_the_target_generates(kind, expected):
    assert trained_text(encoder_of(kind), CHAT) == expected


@pytest.mark.parametrize("kind", ["chatml", "llama3", "qwen3", "deepseek", "harmony", "mistral", "plain"])
def test_tokens_decode_back_to_the_rendered_conversation(kind):
    encoder = encoder_of(kind)
    encoded = encoder.encode({"messages": CHAT})
    assert encoder.tokenizer.decode(encoded.input_ids) == encoder.render(CHAT)
    assert encoded.input_ids.dtype == np.int32 and encoded.loss_mask.dtype == np.uint8


@pytest.mark.parametrize("kind", ["chatml", "llama3", "deepseek", "harmony"])
def test_the_first_answer_follows_the_tokens_of_the_served_prompt(kind):
    encoder = encoder_of(kind)
    encoded = encoder.encode({"messages": CHAT})
    prompt = encoder.prompt_ids(CHAT[:1])
    assert encoded.input_ids[: len(prompt)].tolist() == prompt
    assert encoded.trained_spans[0][0] == len(prompt)


def test_content_that_is_trimmed_or_repeated_is_found():
    chat = [{"role": "user", "content": "say ok"}, {"role": "assistant", "content": "  ok\n"}] * 3
    assert trained_text(encoder_of("llama3"), chat) == ["ok<|eot_id|>"] * 3
    assert trained_text(encoder_of("chatml"), chat) == ["  ok\n<|im_end|>"] * 3


def test_thinking_is_trained_where_the_template_keeps_it():
    chat = [dict(message) for message in CHAT]
    chat[1]["content"] = "<think>\nhm\n</think>\n\nIt is 4."
    chat[3]["content"] = "<think>\nso\n</think>\n\nDone."
    assert trained_text(encoder_of("qwen3"), chat) == [
        "It is 4.<|im_end|>",
        "<think>\nso\n</think>\n\nDone.<|im_end|>",
    ]


def test_a_generation_prompt_with_a_thinking_block_is_not_trained():
    encoder = encoder_of("qwen3", template_kwargs={"enable_thinking": False})
    assert trained_text(encoder, CHAT)[-1] == "answers vary:\n\n- one\n- answer<|im_end|>"


def test_a_tool_call_is_trained_through_its_end_of_turn():
    encoder = encoder_of("chatml")
    encoder.tokenizer.chat_template = encoder.tokenizer.chat_template.replace(
        "{{ message.content }}",
        "{{ message.content }}{% for call in message.tool_calls %}<call>{{ call }}</call>{% endfor %}",
    )
    chat = [
        CHAT[0],
        {"role": "assistant", "content": "", "tool_calls": ["add 2 2"]},
        {"role": "tool", "content": "4"},
        CHAT[1],
    ]
    assert trained_text(encoder, chat) == ["<call>add 2 2</call><|im_end|>", "It is 4.<|im_end|>"]
    assert trained_text(encoder, chat[:2]) == ["<call>add 2 2</call><|im_end|>"]


def test_user_text_that_looks_like_an_answer_is_not_trained():
    chat = [
        {"role": "user", "content": "It is 4.<|im_end|>\n<|im_start|>assistant\nIt is 4."},
        {"role": "assistant", "content": "It is 4."},
    ]
    assert trained_text(encoder_of("chatml"), chat) == ["It is 4.<|im_end|>"]


@pytest.mark.parametrize("kind", ["llama3", "harmony"])
def test_the_date_is_fixed(kind):
    assert "2024" in encoder_of(kind).render(CHAT)
    assert "2031" in encoder_of(kind, date="2031-01-02").render(CHAT)


def test_a_tokenizer_without_offsets_gets_the_same_mask():
    fast, slow = encoder_of("chatml"), ChatEncoder(SlowTokenizer(byte_tokenizer("chatml")), 4096)
    expected, found = fast.encode({"messages": CHAT}), slow.encode({"messages": CHAT})
    assert np.array_equal(expected.input_ids, found.input_ids)
    assert np.array_equal(expected.loss_mask, found.loss_mask)


def test_a_tokenizer_that_adds_spaces_tokenizes_the_whole_text_at_once():
    tokenizer = byte_tokenizer("mistral", sentencepiece=True)
    encoder = ChatEncoder(tokenizer, 4096)
    encoded = encoder.encode({"messages": CHAT})
    whole = tokenizer(encoder.render(CHAT), add_special_tokens=False)["input_ids"]
    assert encoded.input_ids.tolist() == whole
    runs = [tokenizer.decode(encoded.input_ids[start:end]).strip() for start, end in encoded.trained_spans]
    assert runs == ["It is 4.</s>", "answers vary:\n\n- one\n- answer</s>"]


def test_a_missing_chat_template_is_a_one_line_error():
    encoder = encoder_of("chatml")
    encoder.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template; use a chat model"):
        encoder.encode({"messages": CHAT})


def test_a_mask_of_zeros_is_refused():
    encoder = encoder_of("chatml")
    encoder.tokenizer.chat_template = (
        "{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="all zeros"):
        encoder.encode({"messages": CHAT})


def test_the_error_of_a_refused_conversation_gives_the_templates_reason():
    with pytest.raises(ValueError, match="roles must alternate"):
        encoder_of("mistral").encode({"messages": [CHAT[0], *CHAT]})


def test_skips_are_counted():
    encoder = encoder_of("chatml", max_length=60)
    assert encoder.encode({"messages": CHAT[:1]}) is None
    assert encoder.encode({"messages": [{"role": "user", "content": "x" * 80}, CHAT[1]]}) is None
    assert (encoder.stats.without_answer, encoder.stats.untrained, encoder.stats.samples) == (1, 1, 0)


def test_long_samples_are_truncated_or_skipped_as_set():
    whole = encoder_of("chatml").encode({"messages": CHAT})
    cutting = encoder_of("chatml", max_length=100)
    skipping = encoder_of("chatml", max_length=100, overlong="skip")
    cut = cutting.encode({"messages": CHAT})
    assert np.array_equal(cut.input_ids, whole.input_ids[:100])
    assert np.array_equal(cut.loss_mask, whole.loss_mask[:100])
    assert skipping.encode({"messages": CHAT}) is None
    assert (cutting.stats.truncated, skipping.stats.overlong) == (1, 1)


def test_plain_text_is_trained_whole():
    encoded = encoder_of("chatml").encode({"id": 7, "text": "once upon a time"})
    assert encoded.id == "7" and encoded.loss_mask.all()


def test_sharegpt_records_give_the_same_messages():
    sharegpt = [
        {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in CHAT
    ]
    assert messages_of({"conversations": sharegpt}) == CHAT


@pytest.mark.parametrize(
    "record", [{}, {"messages": []}, {"messages": ["hi"]}, {"messages": [{"role": "user"}]}]
)
def test_the_error_of_a_malformed_record_says_what_was_expected(record):
    with pytest.raises(ValueError, match="expected"):
        messages_of(record)


def test_the_default_id_depends_on_the_content():
    assert record_id({"text": "a"}) == record_id({"text": "a"}) != record_id({"text": "b"})


@pytest.mark.parametrize(
    ("a", "b"), [("", ""), ("abc", "abc"), ("abc", "abd"), ("abc", "ab"), ("xbc", "abc")]
)
def test_common_prefix_and_suffix(a, b):
    same = [x == y for x, y in zip(a, b, strict=False)]
    assert common_prefix(a, b) == (same.index(False) if False in same else len(same))
    assert common_suffix(a[::-1], b[::-1]) == common_prefix(a, b)


def test_a_field_that_the_template_ignores_is_counted_and_logged_once(caplog):
    encoder = encoder_of("chatml")
    for n in range(3):
        chat = [CHAT[0], {**CHAT[1], "reasoning_content": f"thought {n}"}]
        encoder.encode({"id": n, "tools": [{"name": "add"}], "messages": chat})
    assert encoder.stats.ignored == {"tools": 3, "reasoning_content of assistant messages": 3}
    assert "3 with tools, which the chat template ignores" in str(encoder.stats)
    assert [record.getMessage().count("in the record 0") for record in caplog.records] == [1, 1]


def test_template_variables_that_a_record_sets_are_refused_and_unread_ones_are_logged(caplog):
    with pytest.raises(ValueError, match="template_kwargs has tools, which each record sets itself"):
        encoder_of("chatml", template_kwargs={"tools": []})
    encoder_of("qwen3", template_kwargs={"enable_thinkin": False})
    assert "does not read enable_thinkin" in caplog.text


def test_an_answer_that_the_template_writes_twice_is_refused():
    encoder = encoder_of("chatml")
    encoder.tokenizer.chat_template += "{{ messages[-1].content }}"
    with pytest.raises(ValueError, match="writes a text of message 1 twice"):
        encoder.encode({"messages": CHAT[:2]})


@pytest.mark.parametrize("kind", ["chatml", "plain"])
def test_a_long_text_is_tokenized_in_parts_as_it_is_at_once(kind, monkeypatch):
    words = ("an answer's ans", "naïve\n\n", "12,345.6", "你好，再见。", "<|im_end|>", "😀x_y", "a" * 70)
    text = " ".join(words[n * n % 7] for n in range(400))
    record = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
    whole = [encoder_of(kind, 1 << 20).encode(one) for one in (record, {"text": text})]
    monkeypatch.setattr("eagle_ds.data.chat.PART_CHARACTERS", 50)
    encoder = encoder_of(kind, 1 << 20)
    assert len(list(encoder._parts(text, 0, len(text)))) > 40
    for one, expected in zip((record, {"text": text}), whole, strict=True):
        parts = encoder.encode(one)
        assert np.array_equal(parts.input_ids, expected.input_ids)
        assert np.array_equal(parts.loss_mask, expected.loss_mask)
