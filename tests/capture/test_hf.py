"""Captured states equal the target's own, whether the sample goes in chunks, in a batch or alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from eagle_ds.capture.hf import ForwardLimits, StateExtractor, decoder_layers
from eagle_ds.target.head import head_logits
from tests.tiny_targets import save_tiny_llama

AUX = (1, 3, 4)
WHOLE = ForwardLimits(batch_tokens=4096, chunk_tokens=4096)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        save_tiny_llama(tmp_path_factory.mktemp("llama")), dtype=torch.float64
    )


def states_of(
    model: nn.Module, limits: ForwardLimits = WHOLE, dtype: torch.dtype = torch.float64
) -> StateExtractor:
    return StateExtractor(model, AUX, dtype, limits)


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 280, (length,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def test_states_are_layer_outputs_and_the_final_norm(model):
    """hidden_states[i + 1] is the output of layer i; its last entry is normed already."""
    ids = tokens(50)
    captured = states_of(model)([ids])[0]
    with torch.no_grad():
        expected = model(input_ids=ids.long()[None], output_hidden_states=True)
    aux = torch.cat([expected.hidden_states[i + 1][0] for i in AUX], dim=1)
    torch.testing.assert_close(captured.aux_hidden_state, aux, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(captured.hidden_state, expected.hidden_states[-1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        captured.target_logsumexp, expected.logits[0].logsumexp(-1).float(), rtol=1e-4, atol=1e-4
    )
    assert torch.equal(captured.target_token_id.long(), expected.logits[0].argmax(-1))
    assert captured.target_token_id.dtype == torch.int32 and captured.target_logsumexp.dtype == torch.float32


@pytest.mark.parametrize("chunk", [7, 32, 99])
def test_chunked_prefill_gives_the_states_of_one_pass(model, chunk):
    ids = tokens(100)
    whole, pieces = states_of(model)([ids])[0], states_of(model, ForwardLimits(128, chunk))([ids])[0]
    torch.testing.assert_close(pieces.aux_hidden_state, whole.aux_hidden_state, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pieces.hidden_state, whole.hidden_state, rtol=1e-5, atol=1e-6)
    assert torch.equal(pieces.target_token_id, whole.target_token_id)


def test_chunked_prefill_keeps_a_sliding_window(tmp_path):
    folder = save_tiny_mistral(tmp_path, window=16)
    windowed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = tokens(100)
    whole, pieces = states_of(windowed)([ids])[0], states_of(windowed, ForwardLimits(128, 24))([ids])[0]
    torch.testing.assert_close(pieces.hidden_state, whole.hidden_state, rtol=1e-5, atol=1e-6)


def save_tiny_mistral(folder, window: int):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 280, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(**sizes, **heads, sliding_window=window, initializer_range=0.3)
    MistralForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_batch_gives_each_sample_its_own_states_without_padding(model):
    samples = [tokens(length, seed=length) for length in (40, 39, 12, 1)]
    states = states_of(model)
    for sample, captured in zip(samples, states(samples), strict=True):
        alone = states([sample])[0]
        assert captured.aux_hidden_state.shape == (len(sample), 3 * 32)
        torch.testing.assert_close(captured.aux_hidden_state, alone.aux_hidden_state, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(captured.target_logsumexp, alone.target_logsumexp, rtol=1e-4, atol=1e-4)


def test_the_head_is_read_from_the_states_as_stored(model):
    """Training computes its labels from the stored bf16 states; argmax and log-sum-exp must use the same."""
    captured = states_of(model, dtype=torch.bfloat16)([tokens(64)])[0]
    logits = captured.hidden_state.float() @ model.lm_head.weight.float().t()
    assert captured.hidden_state.dtype == captured.aux_hidden_state.dtype == torch.bfloat16
    assert torch.equal(captured.target_token_id.long(), logits.argmax(1))
    torch.testing.assert_close(captured.target_logsumexp, logits.logsumexp(1))


def test_logits_are_computed_a_few_rows_at_a_time(model, monkeypatch):
    monkeypatch.setattr("eagle_ds.capture.hf.LOGIT_BYTES", 3 * 280 * 4)
    seen = []

    def counted(hidden: torch.Tensor, head: torch.Tensor, **how) -> torch.Tensor:
        seen.append(len(hidden))
        return head_logits(hidden, head, **how)

    monkeypatch.setattr("eagle_ds.target.head.head_logits", counted)
    states = StateExtractor.__new__(StateExtractor)
    states.head = model.lm_head.weight.detach()
    ids, sums = states.read_head(torch.randn(10, 32))
    assert seen == [3, 3, 3, 1] and len(ids) == len(sums) == 10


def test_a_target_that_scales_its_logits_is_refused(model):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model
            self.get_decoder, self.get_output_embeddings = model.get_decoder, model.get_output_embeddings

        def forward(self, **inputs):
            output = self.inner(**inputs)
            output.logits = 30 * torch.tanh(output.logits / 30)
            return output

    with pytest.raises(ValueError, match="scales or caps"):
        states_of(Scaled())


def test_hooks_are_removed_after_a_failed_pass(model):
    states = states_of(model)
    before = [len(layer._forward_hooks) for layer in model.model.layers]  # transformers has its own
    with pytest.raises(IndexError):
        states([torch.tensor([10**6])])
    assert [len(layer._forward_hooks) for layer in model.model.layers] == before


@pytest.mark.parametrize("ids", [(3, 1, 4), (1, 3, 8), (-1, 2, 3), (1, 1, 2)])
def test_aux_layers_that_the_target_does_not_have_are_refused(model, ids):
    with pytest.raises(ValueError, match=r"ascending layer outputs within 0\.\.7"):
        decoder_layers(model.get_decoder(), ids)
