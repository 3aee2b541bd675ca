"""Compute hidden states with transformers: the aux layers' outputs, the final state, and the head's labels.

A forward pass runs the decoder without its head, and hooks copy the outputs of the aux layers. Logits are
computed for a few rows at a time, because all [S, V] of them would be larger than everything else.

Samples shorter than a chunk are batched and padded on the right. Under a causal mask no token attends to
later ones, so the padding needs no attention mask, and the padded rows are dropped. A longer sample is
computed alone, chunk by chunk with a KV cache.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eagle_ds.target.head import argmax_and_logsumexp, head_logits
from eagle_ds.target.info import check_aux_ids

logger = logging.getLogger(__name__)

LOGIT_BYTES = 256 << 20  # float32 logits that exist at once


@dataclass(frozen=True)
class SampleStates:
    """The hidden states of one sample, on the CPU. Nothing is shifted: row p belongs to token p."""

    aux_hidden_state: torch.Tensor  # [S, A * H], outputs of the aux layers side by side
    hidden_state: torch.Tensor  # [S, H], what the head reads
    target_token_id: torch.Tensor  # int32 [S], argmax of head(hidden_state)
    target_logsumexp: torch.Tensor  # float32 [S], log-sum-exp of head(hidden_state)


@dataclass(frozen=True)
class ForwardLimits:
    """How many tokens one forward pass takes. They bound its device memory."""

    batch_tokens: int  # of a batch of samples, padding included
    chunk_tokens: int  # of one chunk of a longer sample, which is computed alone

    @classmethod
    def for_device(cls, device: torch.device) -> ForwardLimits:
        """Return limits that suit most targets on a GPU or a CPU."""
        return cls(16384, 8192) if device.type == "cuda" else cls(2048, 2048)


class StateExtractor:
    """A loaded target that computes the hidden states of token sequences.

    Args:
        model: a causal language model of transformers.
        aux_ids: the decoder layers whose outputs are taken, 0-based and ascending.
        store_dtype: dtype of the states that are returned.
        limits: tokens of one forward pass; by default those of the model's device.

    Raises: ValueError if the model has other layers, or its logits are not head @ final state.
    """

    def __init__(
        self, model: nn.Module, aux_ids: Sequence[int], store_dtype: torch.dtype,
        limits: ForwardLimits | None = None,
    ) -> None:
        self.model = model.eval()
        self.decoder = model.get_decoder()
        self.head: torch.Tensor = model.get_output_embeddings().weight
        self.device = next(self.decoder.parameters()).device
        self.limits = limits or ForwardLimits.for_device(self.device)
        self.store_dtype = store_dtype
        self._layers = decoder_layers(self.decoder, aux_ids)
        check_head(self)

    @torch.inference_mode()
    def __call__(self, samples: Sequence[torch.Tensor]) -> list[SampleStates]:
        """Compute the states of each sample (int [S]), all in one padded batch.

        Raises: ValueError if there are several samples and one is longer than a chunk: that one must go
        alone.
        """
        width = max(map(len, samples))
        if len(samples) > 1 and width > self.limits.chunk_tokens:
            raise ValueError(
                f"a batch of {len(samples)} samples has one of {width} tokens, longer than a chunk of "
                f"{self.limits.chunk_tokens}; pass that sample alone")
        ids = torch.zeros(len(samples), width, dtype=torch.long)
        for row, sample in zip(ids, samples, strict=True):
            row[: len(sample)] = sample
        aux, hidden = self._forward(ids.to(self.device))
        lengths = [len(sample) for sample in samples]
        return [self._with_labels(aux[i, :length], hidden[i, :length]) for i, length in enumerate(lengths)]

    def _forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the decoder on ids [B, S].

        Returns aux [B, S, A * H] and hidden [B, S, H] on the CPU, in the stored dtype.
        """
        chunks = ids.split(self.limits.chunk_tokens, dim=1)
        cache: Any = None
        hidden: list[torch.Tensor] = []
        with self._captured_aux() as aux:
            for chunk in chunks:
                output = self.decoder(input_ids=chunk, past_key_values=cache, use_cache=len(chunks) > 1)
                cache = output.past_key_values
                hidden.append(self._to_host(output.last_hidden_state))
        # Each layer has a list of [B, chunk, H]: join its chunks, then put the layers side by side.
        return torch.cat([torch.cat(parts, dim=1) for parts in aux], dim=2), torch.cat(hidden, dim=1)

    def _to_host(self, states: torch.Tensor) -> torch.Tensor:
        return states.to(self.store_dtype).cpu()

    @contextlib.contextmanager
    def _captured_aux(self) -> Iterator[list[list[torch.Tensor]]]:
        """Append the outputs [B, chunk, H] of each aux layer to one list per layer while the context is open.

        Forward hooks are used because ``output_hidden_states=True`` would keep the outputs of all layers. The
        hooks are removed even if the pass fails, so that a later pass does not append twice.
        """
        outputs: list[list[torch.Tensor]] = [[] for _ in self._layers]

        def appending_to(parts: list[torch.Tensor]) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                # Depending on the version, a decoder layer returns its states or a tuple that begins with
                # them.
                parts.append(self._to_host(output if torch.is_tensor(output) else output[0]))

            return hook

        pairs = zip(self._layers, outputs, strict=True)
        handles = [layer.register_forward_hook(appending_to(parts)) for layer, parts in pairs]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    def _with_labels(self, aux: torch.Tensor, hidden: torch.Tensor) -> SampleStates:
        return SampleStates(aux.contiguous(), hidden.contiguous(), *self.read_head(hidden))

    def read_head(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute argmax int32 [S] and log-sum-exp float32 [S] of the head's logits, on the CPU.

        ``hidden`` [S, H] are the states AS STORED, already rounded: training computes its label probabilities
        from those, and argmax and log-sum-exp must be of the same logits.
        """
        token, logsumexp = argmax_and_logsumexp(hidden, self.head, LOGIT_BYTES)
        return token.to(torch.int32).cpu(), logsumexp.float().cpu()


def decoder_layers(decoder: nn.Module, aux_ids: Sequence[int]) -> list[nn.Module]:
    """Return the decoder's layers ``aux_ids``. Raises ValueError if it has no such layers."""
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        detail = "has no list of layers; use a decoder-only language model as target"
        raise ValueError(f"{type(decoder).__name__} {detail}")
    check_aux_ids(aux_ids, len(layers))
    return [layers[i] for i in aux_ids]


@torch.inference_mode()
def check_head(extractor: StateExtractor) -> None:
    """Raise ValueError if the target's logits are not head @ h, but scaled, capped, or with a bias.

    The draft's labels are softmax(head @ h). For such a target they would be wrong without any error. The
    comparison runs on eight arbitrary tokens.
    """
    ids = torch.arange(8, device=extractor.device)[None]
    output = extractor.decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
    expected = extractor.model(input_ids=ids, use_cache=False).logits[0].float()
    found = head_logits(output.to(extractor.head.dtype), extractor.head).to(expected.device)
    tolerance = 2e-2 if extractor.head.element_size() == 2 else 1e-4
    if (found - expected).norm() > tolerance * expected.norm():
        raise ValueError(
            f"{type(extractor.model).__name__} does not compute its logits as head @ final state (it scales "
            "or caps them, or adds a bias); a draft cannot be trained on such a target")


def load_model(folder: Path, dtype: str, device: str = "auto", attention: str = "sdpa") -> nn.Module:
    """Load the target with transformers.

    Args:
        folder: Hugging Face folder of the target.
        dtype: of its arithmetic; ``auto`` is the dtype of its files.
        device: ``auto`` is a GPU if there is one; ``split`` spreads the layers over all GPUs.
        attention: transformers' implementation: sdpa, eager or flash_attention_2.

    Raises: ValueError, one sentence, if transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device_map: Any = "auto" if device == "split" else {"": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype), attn_implementation=attention,
            device_map=None if device == "cpu" else device_map)
    # AssertionError: torch was built without CUDA
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"the target {folder} cannot be loaded by transformers: {first_line}") from error
    logger.info("target %s loaded on %s in %s, %s attention", folder, device, dtype, attention)
    return model
