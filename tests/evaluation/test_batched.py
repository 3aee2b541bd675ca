"""Decoding in batches gives the tokens, passes and divergences of decoding one prompt at a time."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from eagle_ds.drafts.cached_draft import CachedDraft
from eagle_ds.evaluation.batched import BatchDecoder
from eagle_ds.evaluation.decoding import (
    CachedTarget,
    Decoded,
    DecodeSettings,
    decode_plain,
    decode_speculative,
    prefill,
)
from tests.draft_cases import LAYERS, ONLY_VLLM, VARIANTS, layers_of, random_draft, variant
from tests.tiny_targets import save_tiny_llama

PROMPTS = ([5, 6, 7], list(range(10, 50)), [99] * 17, [4], list(range(200, 140, -3)))
SIZES = {
    "vocab_size": 280, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> CachedTarget:
    folder = save_tiny_llama(tmp_path_factory.mktemp("target"))
    return CachedTarget(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), LAYERS)


def one_by_one(
    target: CachedTarget, draft: CachedDraft, settings: DecodeSettings
) -> tuple[list[Decoded], list[Decoded]]:
    plain, speculative = [], []
    for prompt in PROMPTS:
        start = prefill(target, prompt)
        plain.append(decode_plain(target, start, settings))
        speculative.append(decode_speculative(target, draft, start, settings, plain[-1]))
    return plain, speculative


def cached(target: CachedTarget, name: str = "plain") -> CachedDraft:
    arch = variant(name)
    if arch.trains_embedding:  # for a target as wide as the tiny one
        arch = replace(arch, hidden_size=16, target_hidden_size=32)
    draft = random_draft(arch)
    return CachedDraft(draft.build(target.model.get_input_embeddings().weight, torch.float32), draft.vocab)


def assert_same(together: list[Decoded], alone: list[Decoded]) -> None:
    for found, expected in zip(together, alone, strict=True):
        assert found.tokens == expected.tokens
        assert found.rounds == expected.rounds
        assert found.divergence == expected.divergence
        torch.testing.assert_close(
            torch.tensor(found.margins), torch.tensor(expected.margins), equal_nan=True, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("name", VARIANTS | ONLY_VLLM)
def test_a_batch_gives_what_one_prompt_at_a_time_gives(tiny_target: CachedTarget, name: str) -> None:
    target = CachedTarget(tiny_target.model, layers_of(variant(name)))
    draft, settings = cached(target, name), DecodeSettings(20, 4)
    plain, speculative = one_by_one(target, draft, settings)
    batch = BatchDecoder(target, PROMPTS, settings)
    together = batch.plain()
    assert_same(together, plain)
    assert_same(batch.speculative(draft, together), speculative)


@pytest.mark.gpu
def test_a_batch_on_a_gpu_gives_what_one_prompt_at_a_time_gives(tiny_target: CachedTarget) -> None:
    target = CachedTarget(deepcopy(tiny_target.model).cuda(), LAYERS)
    draft = random_draft()
    embedding = target.model.get_input_embeddings().weight
    moved = CachedDraft(draft.build(embedding, torch.float32, "cuda"), draft.vocab)
    settings = DecodeSettings(20, 4)
    plain, speculative = one_by_one(target, moved, settings)
    batch = BatchDecoder(target, PROMPTS, settings)
    assert [answer.tokens for answer in batch.plain()] == [answer.tokens for answer in plain]
    found = batch.speculative(moved, plain)
    assert [answer.tokens for answer in found] == [answer.tokens for answer in speculative]
    assert [answer.rounds for answer in found] == [answer.rounds for answer in speculative]


def test_rows_that_stop_early_leave_the_others_as_they_are(tiny_target: CachedTarget) -> None:
    draft, settings = cached(tiny_target), DecodeSettings(30, 3)
    plain, _ = one_by_one(tiny_target, draft, settings)
    # A token of each of two answers ends them, at different places.
    stops = frozenset({plain[0].tokens[4], plain[2].tokens[11]})
    settings = replace(settings, stop_ids=stops)
    plain, speculative = one_by_one(tiny_target, draft, settings)
    assert len({len(answer.tokens) for answer in plain}) > 1
    batch = BatchDecoder(tiny_target, PROMPTS, settings)
    assert_same(batch.plain(), plain)
    assert_same(batch.speculative(draft, plain), speculative)


class Copying:
    """A draft's proposals replaced by the plain answers with some errors, so that rows advance unequally."""

    def __init__(self, plain: list[Decoded]) -> None:
        self.plain = plain

    def propose(self, drafted: Any, steps: int) -> torch.Tensor:
        rows = []
        for row, answer in enumerate(self.plain):
            known = int(drafted.rows[row]) - len(PROMPTS[row]) + 1
            tokens = (answer.tokens + [0] * steps)[known : known + steps]
            tokens += [0] * (steps - len(tokens))
            rows.append([(t + 1) % 280 if (known + i) % (2 + row) == 1 else t for i, t in enumerate(tokens)])
        return torch.tensor(rows)


def test_rows_may_accept_different_numbers_of_tokens(
    tiny_target: CachedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DecodeSettings(40, 4)
    batch = BatchDecoder(tiny_target, PROMPTS, settings)
    plain = batch.plain()
    copying = Copying(plain)
    propose = "eagle_ds.evaluation.batched.BatchedDraft.propose"
    monkeypatch.setattr(propose, lambda *args: copying.propose(*args))
    answers = batch.speculative(cached(tiny_target), plain)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in plain]
    assert len({len(answer.rounds) for answer in answers}) > 2
    for answer in answers:
        assert sum(one.gained for one in answer.rounds) >= len(answer.tokens) - 1


def save_windowed(kind: str) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(sliding_window=6, **SIZES))
    layers = ["sliding_attention", "full_attention"] * 4
    return Gemma3ForCausalLM(Gemma3TextConfig(sliding_window=6, layer_types=layers, head_dim=8, **SIZES))


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_a_target_with_sliding_windows_can_decode_in_batches(kind: str) -> None:
    target, settings = CachedTarget(save_windowed(kind).eval(), LAYERS), DecodeSettings(25, 4)
    draft = cached(target)
    plain, speculative = one_by_one(target, draft, settings)
    batch = BatchDecoder(target, PROMPTS, settings)
    assert_same(batch.plain(), plain)
    assert_same(batch.speculative(draft, plain), speculative)


def test_layers_that_a_mask_cannot_describe_are_refused(tiny_target: CachedTarget) -> None:
    tiny_target.model.config.layer_types = ["chunked_attention"] * 8
    try:
        with pytest.raises(ValueError, match="chunked_attention, which cannot decode in batches"):
            BatchDecoder(tiny_target, PROMPTS, DecodeSettings(4, 2))
    finally:
        del tiny_target.model.config.layer_types
