"""Regeneration keeps the users' messages, replaces the assistants', and continues after a stop."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM

from eagle_ds.capture import regenerate as regeneration
from eagle_ds.capture.regenerate import (
    Answer,
    EndpointGenerator,
    Regenerated,
    Sampling,
    TransformersGenerator,
    distinct_ratio,
    regenerate,
)
from eagle_ds.data.conversations import Intake
from tests.tiny_targets import save_tiny_llama

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "written by somebody else"},
    {"role": "user", "content": "two"},
]


class Echo:
    """Answers with the number of messages it saw and the last one; may fail at a given call."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls, self.fail_at = 0, fail_at

    def generate(self, prompts: Sequence[list[dict]], tools=None) -> list[Answer | None]:
        self.calls, self.tools = self.calls + 1, tools
        if self.calls == self.fail_at:
            raise ValueError("gone")
        return [Answer(f"{len(prompt)} {prompt[-1]['content']}", 2, "stop") for prompt in prompts]


def write(path, conversations: dict[str, list[dict]]):
    records = [{"id": name, "messages": messages} for name, messages in conversations.items()]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path) -> dict[str, list[dict]]:
    return {record["id"]: record["messages"] for record in map(json.loads, path.read_text().splitlines())}


def test_every_answer_is_generated_in_the_context_of_the_earlier_ones(tmp_path):
    source = write(tmp_path / "in.jsonl", {"a": TALK, "b": TALK[1:2]})
    assert regenerate(source, tmp_path / "out.jsonl", Echo(), batch_size=2) == 2
    answers = {
        name: [
            m["content"] for m in messages if m["role"] == "assistant"
        ] for name, messages in read(tmp_path / "out.jsonl").items()
    }
    assert answers == {"a": ["2 one", "4 two"], "b": ["1 one"]}
    assert [
        m["role"] for m in read(tmp_path / "out.jsonl")["a"]
    ] == ["system", "user", "assistant", "user", "assistant"]


def test_a_stopped_run_continues_without_repeating(tmp_path):
    source = write(tmp_path / "in.jsonl", {str(n): TALK[1:2] for n in range(6)})
    output = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="gone"):
        regenerate(source, output, Echo(fail_at=3), batch_size=2)
    assert len(read(output)) == 4
    output.write_text(output.read_text() + '{"id": "torn')
    assert regenerate(source, output, Echo(), batch_size=2) == 2
    assert sorted(read(output)) == [str(n) for n in range(6)]


class Script:
    """Gives prepared answers in turn."""

    def __init__(self, *answers: str | None) -> None:
        self.answers = list(answers)

    def generate(self, prompts: Sequence[list[dict]]) -> list[Answer | None]:
        texts = [self.answers.pop(0) for _ in prompts]
        return [None if text is None else Answer(text, 1, "stop") for text in texts]


LOOP = "the fox ran over the hill and the road " * 9


def test_a_turn_whose_answer_loops_is_left_out(tmp_path):
    talk = [{"role": "user", "content": text} for text in ("first", "second", "third")]
    source = write(tmp_path / "in.jsonl", {"a": talk})
    regenerate(source, tmp_path / "out.jsonl", Script("fine", LOOP, "also fine"), min_distinct=0.5)
    assert [
        m["content"] for m in read(tmp_path / "out.jsonl")["a"]
    ] == ["first", "fine", "third", "also fine"]


@pytest.mark.parametrize("answers", [(LOOP,), ("",), (None,)])
def test_a_conversation_without_a_usable_answer_is_skipped_and_not_tried_again(tmp_path, answers):
    source, output = write(tmp_path / "in.jsonl", {"a": TALK}), tmp_path / "out.jsonl"
    assert regenerate(source, output, Script(*answers), min_distinct=0.5) == 0
    assert regenerate(source, output, Script(), min_distinct=0.5) == 0
    assert output.read_text() == ""


def test_a_turn_that_no_longer_fits_ends_the_conversation():
    talk = Regenerated.start({"id": "a", "messages": TALK})
    assert talk.next_prompt()
    talk.add_answer(Answer("yes", 1, "stop"), 0.0)
    assert talk.next_prompt()
    talk.add_answer(None, 0.0)
    assert not talk.next_prompt() and [m["role"] for m in talk.messages] == ["system", "user", "assistant"]


def test_prose_is_distinct_and_loops_are_not():
    assert distinct_ratio("a short answer") == 1.0
    assert distinct_ratio(" ".join(map(str, range(100)))) == 1.0
    assert distinct_ratio(LOOP) < 0.2


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("target"))


def test_batched_greedy_answers_equal_plain_greedy_decoding(target):
    generator = TransformersGenerator(str(target), Sampling(max_new_tokens=12), dtype="float32", device="cpu")
    prompts = [[{"role": "user", "content": text}] for text in ("a", "a much longer question than the first")]
    batched = generator.generate(prompts)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    for prompt, answer in zip(prompts, batched, strict=True):
        ids = generator.encoder.prompt_ids(prompt)
        for _ in range(answer.tokens):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        expected = generator.encoder.tokenizer.decode(
            ids[len(ids) - answer.tokens :], skip_special_tokens=True
        )
        assert answer.text == expected and answer.finish == ("stop" if answer.tokens < 12 else "length")


def test_a_prompt_that_leaves_no_space_for_an_answer_gets_none(target):
    generator = TransformersGenerator(
        str(target), Sampling(max_new_tokens=20), dtype="float32", device="cpu", max_length=60
    )
    assert generator.generate([[{"role": "user", "content": "x" * 100}]]) == [None]


@pytest.fixture
def server():
    """Serve an endpoint that is first busy, refuses prompts with 'too long', and answers its model name."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers.get("Authorization"), body))
            status = 503 if len(seen) == 1 else 400 if "too long" in body["messages"][-1]["content"] else 200
            choice = {"message": {"content": f"I am {body['model']}"}, "finish_reason": "stop"}
            reply = json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as endpoint:
        thread = threading.Thread(target=endpoint.serve_forever, daemon=True)
        thread.start()
        endpoint.seen = seen
        yield endpoint
        endpoint.shutdown()


def test_an_endpoint_answers_concurrently_and_is_asked_again_while_it_is_busy(server, tmp_path, monkeypatch):
    monkeypatch.setattr(regeneration.time, "sleep", lambda _: None)
    conversations = {str(n): TALK for n in range(5)} | {"long": [{"role": "user", "content": "too long"}]}
    source = write(tmp_path / "in.jsonl", conversations)
    generator = EndpointGenerator(
        f"http://127.0.0.1:{server.server_port}/v1", "tiny", Sampling(temperature=0.5, seed=3), api_key="k"
    )
    assert regenerate(source, tmp_path / "out.jsonl", generator, batch_size=1, concurrency=3) == 5
    assert all(
        m["content"] == "I am tiny" for messages in read(
            tmp_path / "out.jsonl"
        ).values() for m in messages if m["role"] == "assistant"
    )
    path, key, body = server.seen[0]
    assert (path, key, body["temperature"], body["seed"]) == ("/v1/chat/completions", "Bearer k", 0.5, 3)


def test_an_endpoint_that_cannot_be_reached_gives_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(regeneration.time, "sleep", lambda _: None)
    source = write(tmp_path / "in.jsonl", {"a": TALK})
    with pytest.raises(ValueError, match=r"cannot be reached .* start the server"):
        regenerate(
            source, tmp_path / "out.jsonl", EndpointGenerator("http://127.0.0.1:9/v1", "m", Sampling())
        )


CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def test_tools_reach_the_generator_and_the_output_and_calls_are_kept(tmp_path):
    messages = [*TALK, CALL, {"role": "tool", "content": "4"}]
    record = {"id": "a", "tools": [{"name": "add"}], "messages": messages}
    (tmp_path / "in.jsonl").write_text(json.dumps(record) + "\n")
    echo = Echo()
    assert regenerate(tmp_path / "in.jsonl", tmp_path / "out.jsonl", echo) == 1
    written = json.loads((tmp_path / "out.jsonl").read_text())
    assert echo.tools == [TOOLS] and written["tools"] == TOOLS
    roles = [message["role"] for message in written["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant", "assistant", "tool", "assistant"]


def test_records_that_cannot_be_used_are_listed_and_do_not_stop_the_rest(tmp_path):
    source, output = write(tmp_path / "in.jsonl", {"a": TALK, "b": []}), tmp_path / "out.jsonl"
    source.write_text(source.read_text() + '{"text": "plain"}\n{broken\n')
    with pytest.raises(ValueError, match="line 2: expected a list"):
        regenerate(source, output, Echo())
    assert regenerate(source, output, Echo(), intake=Intake(strict=False)) == 1
    listed = [json.loads(line) for line in (tmp_path / "out.jsonl.rejected").read_text().splitlines()]
    assert [one["line"] for one in listed] == [2, 3, 4]


def test_an_answer_with_a_call_ends_the_conversation():
    talk = Regenerated.start({"id": "a", "messages": TALK})
    talk.next_prompt()
    talk.add_answer(Answer("", 3, "tool_calls", {"tool_calls": CALL["tool_calls"]}), 0.5)
    assert talk.messages[-1] == CALL and not talk.next_prompt()


def test_an_endpoint_gets_tools_and_template_variables(server, monkeypatch):
    monkeypatch.setattr(regeneration.time, "sleep", lambda _: None)
    url, variables = f"http://127.0.0.1:{server.server_port}/v1", {"enable_thinking": False}
    generator = EndpointGenerator(url, "tiny", Sampling(), template_kwargs=variables)
    assert generator.generate([TALK, TALK], [TOOLS, None])[1].text == "I am tiny"
    _, _, first = server.seen[0]
    _, _, last = server.seen[-1]
    assert first["tools"] == TOOLS and first["chat_template_kwargs"] == variables and "tools" not in last


def test_a_conversation_that_the_template_refuses_is_not_answered(tmp_path):
    folder = save_tiny_llama(tmp_path / "target", kind="mistral")
    generator = TransformersGenerator(str(folder), Sampling(max_new_tokens=2), dtype="float32", device="cpu")
    question = [{"role": "user", "content": "one"}]
    refused, answered = generator.generate([question * 2, question])
    assert refused is None and answered is not None
