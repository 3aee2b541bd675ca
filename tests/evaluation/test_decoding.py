"""Speculative decoding is lossless, drafts as training simulates it, and caches only true states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from eagle_ds.capture.hf import StateExtractor
from eagle_ds.data.batch import TokenLabels
from eagle_ds.data.vocab import VocabMap
from eagle_ds.drafts.loading import DraftOnDisk
from eagle_ds.evaluation.decoding import (
    CachedDraft,
    CachedTarget,
    Decoded,
    DecodeSettings,
    Round,
    decode_plain,
    decode_speculative,
    prefill,
    spacing_at,
)
from eagle_ds.model.arch import DraftArch
from eagle_ds.sharding.sequence import Document, shard_sequence
from tests.draft_cases import LAYERS, ONLY_VLLM, VARIANTS, random_draft, variant
from tests.micro_batch import WholeSequence, prefix_for, rank_batch
from tests.tiny_targets import save_tiny_llama

PROMPTS = ([5, 6, 7], list(range(10, 50)), [99] * 17)


@pytest.fixture(scope="module")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> CachedTarget:
    folder = save_tiny_llama(tmp_path_factory.mktemp("target"))
    return CachedTarget(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), LAYERS)


class Scripted:
    """A draft that gives the plain answer except at chosen positions, so every count of accepted tokens
    occurs.
    """

    def __init__(self, answer: list[int], prompt_length: int, wrong: set[int]) -> None:
        self.answer, self.offset, self.wrong = answer, prompt_length, wrong
        self.rows = 0
        self.seen: list[int] = []

    def reset(self) -> None:
        self.rows, self.seen = 0, []

    def extend(self, aux: Tensor, next_ids: Tensor) -> None:
        assert len(aux) == len(next_ids)
        self.rows += len(aux)
        self.seen += next_ids.tolist()

    def propose(self, steps: int) -> Tensor:
        known = self.rows - self.offset + 1  # answer tokens that the draft has been given
        tokens = [self.answer[i] if i < len(self.answer) else 0 for i in range(known, known + steps)]
        return torch.tensor(
            [(token + 1) % 280 if known + i in self.wrong else token for i, token in enumerate(tokens)]
        )


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_the_answer_is_that_of_plain_greedy_decoding(
    tiny_target: CachedTarget, prompt: list[int], steps: int
) -> None:
    settings = DecodeSettings(40, steps)
    start = prefill(tiny_target, prompt)
    plain = decode_plain(tiny_target, start, settings)
    wrong = set(np.random.default_rng(steps).choice(40, 12, replace=False).tolist())
    scripted = Scripted(plain.tokens, len(prompt), wrong)
    answer = decode_speculative(tiny_target, scripted, start, settings, plain)
    assert answer.tokens == plain.tokens and answer.divergence is None
    assert len({one.accepted for one in answer.rounds}) > 1
    assert scripted.seen[: len(prompt) + 39] == (prompt[1:] + plain.tokens)[: len(prompt) + 39]


@pytest.mark.parametrize("name", ["plain", "sliding window", "norm_output", "own embedding"])
def test_a_real_draft_gives_the_plain_answer(tiny_target: CachedTarget, name: str) -> None:
    draft = random_draft(variant(name))
    if name == "own embedding":   # for a target as wide as the tiny one
        draft = random_draft(
            DraftArch(**{**variant("plain").__dict__, "hidden_size": 16, "target_hidden_size": 32})
        )
    cached = CachedDraft(
        draft.build(tiny_target.model.get_input_embeddings().weight, torch.float32), draft.vocab
    )
    for prompt in PROMPTS:
        start = prefill(tiny_target, prompt)
        plain = decode_plain(tiny_target, start, DecodeSettings(24))
        answer = decode_speculative(tiny_target, cached, start, DecodeSettings(24, 4), plain)
        assert answer.tokens == plain.tokens


def test_the_embedded_target_gives_its_plain_answer(embedded_target: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded_target, dtype=torch.float32).eval()
    target, settings = CachedTarget(model, (1, 14, 26)), DecodeSettings(10, 4)
    start = prefill(target, [1, 9690, 198, 2683, 359, 253, 5356])
    plain = decode_plain(target, start, settings)
    expected = model.generate(
        start.ids[None], max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=2
    )
    assert plain.tokens == expected[0, len(start.ids) :].tolist()
    answer = decode_speculative(
        target, Scripted(plain.tokens, len(start.ids), {2, 6}), start, settings, plain
    )
    assert answer.tokens == plain.tokens and len(answer.rounds) < 9


def test_a_sliding_window_target_can_be_cropped_beyond_its_window(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2
    }
    model = MistralForCausalLM(
        MistralConfig(vocab_size=280, sliding_window=6, initializer_range=0.3, **sizes)
    ).eval()
    target, settings = CachedTarget(model, LAYERS), DecodeSettings(30, 5)
    start = prefill(target, list(range(30, 50)))
    plain = decode_plain(target, start, settings)
    expected = model.generate(
        start.ids[None], max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=2
    )
    assert plain.tokens == expected[0, 20:].tolist()
    assert decode_speculative(
        target, Scripted(plain.tokens, 20, {3, 4, 9, 15, 22}), start, settings, plain
    ).tokens == plain.tokens


def test_reading_a_prompt_in_pieces_gives_the_same_states(
    tiny_target: CachedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prefill(tiny_target, list(range(100)))
    monkeypatch.setattr("eagle_ds.evaluation.decoding.PREFILL_TOKENS", 7)
    pieces = prefill(tiny_target, list(range(100)))
    assert pieces.first == whole.first
    torch.testing.assert_close(pieces.aux, whole.aux, rtol=1e-4, atol=1e-4)


def test_the_draft_reads_the_states_that_capture_stores(tiny_target: CachedTarget) -> None:
    start = prefill(tiny_target, PROMPTS[1])
    captured = StateExtractor(tiny_target.model, LAYERS, torch.float32)([start.ids])[0]
    torch.testing.assert_close(start.aux, captured.aux_hidden_state, rtol=1e-5, atol=1e-5)
    assert start.first == int(captured.target_token_id[-1])


# -- drafting is what training simulates ---------------------------------------------------------------------


def unrolled(
    draft: DraftOnDisk, embedding: Tensor, ids: Tensor, aux: Tensor, row: int, steps: int
) -> list[Tensor]:
    """Logits of every TTT step at ``row``, by the training code."""
    model = draft.build(embedding, torch.float64)
    length = len(ids)
    document = Document(length, ((row, row + 2),))
    plan = shard_sequence(
        [document], ulysses=1, ring=1, ring_mode="gather",
        ttt_steps=steps, alignment="feature", trained_rows_only=True,
    )
    mask = np.zeros(length, np.uint8)
    mask[row : row + 2] = 1
    whole = WholeSequence(
        [TokenLabels(ids.numpy().astype(np.int32), mask)], aux, aux[:, : draft.arch.target_hidden_size]
    )
    batch = rank_batch(plan, 0, whole, "feature")
    states = model.unroll(batch, prefix_for(model, plan))
    at = int((batch.query_positions == row).nonzero())
    return [model.head.logits(state)[at] for state in states]


@pytest.mark.parametrize("name", [name for name in VARIANTS | ONLY_VLLM if name != "whole vocabulary"])
def test_a_drafted_chain_has_the_logits_of_the_training_unroll(name: str) -> None:
    draft, length, row, steps = random_draft(variant(name)), 20, 11, 5
    torch.manual_seed(1)
    ids, aux = torch.randint(0, 280, (length,)), torch.randn(
        length, draft.arch.num_aux * draft.arch.target_hidden_size, dtype=torch.float64
    )
    embedding = torch.randn(280, 32, dtype=torch.float64)
    cached = CachedDraft(draft.build(embedding, torch.float64), draft.vocab)
    cached.extend(aux[:4], ids[1:5])
    cached.propose(3)  # draft keys, which verification overwrites
    cached.extend(aux[4 : row + 1], ids[5 : row + 2])
    state, embedded, found = cached.state, None, []
    for step in range(steps):
        logits, state = cached.step(step, state, embedded)
        found.append(logits[0])
        embedded = cached.draft.embed_tokens(ids[row + 2 + step][None])
    for step, expected in enumerate(unrolled(draft, embedding, ids, aux, row, steps)):
        torch.testing.assert_close(found[step], expected, rtol=1e-6, atol=1e-6, msg=f"step {step}")


@torch.inference_mode()
def test_after_verification_the_cache_holds_only_true_keys(tiny_target: CachedTarget) -> None:
    draft = random_draft()
    cached = CachedDraft(
        draft.build(tiny_target.model.get_input_embeddings().weight, torch.float32), draft.vocab
    )
    start = prefill(tiny_target, PROMPTS[0])
    answer = decode_speculative(tiny_target, cached, start, DecodeSettings(20, 4))
    rows, keys = cached.rows, cached.keys[: cached.rows].clone()
    text = torch.cat([start.ids, torch.tensor(answer.tokens)])
    again = prefill(tiny_target, text[:rows].tolist())
    cached.reset()
    cached.extend(again.aux, text[1 : rows + 1])
    torch.testing.assert_close(keys, cached.keys[:rows], rtol=1e-4, atol=1e-4)


# -- known answers -------------------------------------------------------------------------------------------


def known_models(vocab_size: int = 64) -> tuple[CachedTarget, CachedDraft]:
    """A target that answers t + 1, and a draft that is right once per pass: always 2 tokens per pass."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": vocab_size, "intermediate_size": 8, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocab_size))
        model.lm_head.weight.copy_(torch.eye(vocab_size).roll(1, 0))
    arch = DraftArch(vocab_size, 8, 4, 2, 16, vocab_size, vocab_size, vocab_size, 128, 10000.0)
    draft = random_draft(arch, layers=None)
    state = {
        name: torch.zeros_like(tensor) if "proj" in name else tensor for name, tensor in draft.state.items()
    }
    state["fc.weight"] = torch.cat([torch.eye(vocab_size), torch.zeros(vocab_size, 2 * vocab_size)], dim=1)
    state["head.weight"], state["head.norm_weight"] = torch.eye(vocab_size).roll(2, 0), torch.ones(vocab_size)
    built = DraftOnDisk(state, arch, VocabMap.identity(vocab_size), Path("known")).build(
        torch.eye(vocab_size), torch.float32
    )
    return CachedTarget(model, (1, 2, 3)), CachedDraft(built, VocabMap.identity(vocab_size))


def test_a_draft_that_is_right_once_per_pass_gains_two_tokens() -> None:
    target, draft = known_models()
    answer = decode_speculative(target, draft, prefill(target, [3, 4, 5]), DecodeSettings(21, 4))
    assert answer.tokens == list(range(6, 27))
    assert answer.rounds == [Round(context=4 + 2 * i, reached=2, accepted=1, gained=2) for i in range(10)]


@pytest.mark.parametrize(
    ("stop", "last"), [(9, Round(6, 1, 1, 1)), (10, Round(6, 2, 1, 2))], ids=[
        "the stop token was drafted", "the stop token came free"
    ]
)
def test_an_answer_ends_at_its_stop_token(stop: int, last: Round) -> None:
    target, draft = known_models()
    settings = DecodeSettings(21, 4, frozenset({stop}))
    start = prefill(target, [3, 4, 5])
    answer = decode_speculative(target, draft, start, settings)
    assert answer.tokens == decode_plain(target, start, settings).tokens == list(range(6, stop + 1))
    assert answer.rounds == [Round(4, 2, 1, 2), last]


def test_a_divergence_is_recorded_once_with_its_gap() -> None:
    target, draft = known_models()
    start = prefill(target, [3, 4, 5])
    plain = decode_plain(target, start, DecodeSettings(12))
    altered = Decoded([*plain.tokens[:5], 1, 2, *plain.tokens[7:]], margins=plain.margins)
    found = decode_speculative(target, draft, start, DecodeSettings(12, 4), altered).divergence
    assert (found.position, found.plain_token, found.token) == (5, 1, 11)
    assert found.gap > 0 and found.plain_margin == plain.margins[5] and 0 < found.spacing < 1e-5


@pytest.mark.parametrize(
    ("logit", "dtype", "spacing"),
    [(16.0, torch.bfloat16, 0.125), (-31.875, torch.bfloat16, 0.125), (32.0, torch.bfloat16, 0.25),
     (15.9375, torch.bfloat16, 0.0625), (1.0, torch.float32, 2.0**-23)],
)
def test_the_spacing_of_logits_is_that_of_their_dtype(
    logit: float, dtype: torch.dtype, spacing: float
) -> None:
    exact = torch.tensor(logit, dtype=dtype)
    assert spacing_at(exact) == spacing
    away = 1 if logit > 0 else -1
    assert float(torch.tensor(logit + away * spacing, dtype=dtype)) == logit + away * spacing
    assert float(torch.tensor(logit + away * 0.4 * spacing, dtype=dtype)) == logit


def test_layers_that_the_target_lacks_are_refused(tiny_target: CachedTarget) -> None:
    with pytest.raises(ValueError, match="aux_layer_ids"):
        CachedTarget(tiny_target.model, (1, 2, 8))
