"""Hidden states by transformers: three aux layers, the final state, and what the head makes of it.

A forward pass runs the decoder without its head; hooks take the outputs of the aux layers. Samples shorter than a chunk
are batched, padded on the right: under a causal mask padding that comes later changes nothing, so no attention mask is needed
and the padded rows are dropped. Longer samples go alone, chunk by chunk through a KV cache. Logits exist for a few rows at
a time, never for a sample.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eagle_ds.target.files import check_aux_ids

log = logging.getLogger(__name__)

LOGIT_BYTES = 256 << 20


@dataclass(frozen=True)
class States:
    """Captured states of one sample, on the CPU, nothing shifted."""

    aux_hidden_state: torch.Tensor  # [S, A * H], outputs of the aux layers side by side
    hidden_state: torch.Tensor  # [S, H], what the head reads
    target_token_id: torch.Tensor  # int32 [S], argmax of head(hidden_state)
    target_logsumexp: torch.Tensor  # float32 [S]


@dataclass(frozen=True)
class ForwardLimits:
    """How many tokens go through the target at once, padding included, and how long a chunk of a long sample is."""

    batch_tokens: int
    chunk_tokens: int

    @classmethod
    def for_device(cls, device: torch.device) -> ForwardLimits:
        return cls(16384, 8192) if device.type == "cuda" else cls(2048, 2048)


class HiddenStates:
    """A loaded target that hands out the hidden states of token sequences."""

    def __init__(self, model: nn.Module, aux_ids: Sequence[int], store_dtype: torch.dtype, limits: ForwardLimits | None = None) -> None:
        self.model = model.eval()
        self.decoder = model.get_decoder()
        self.head: torch.Tensor = model.get_output_embeddings().weight
        self.device = next(self.decoder.parameters()).device
        self.limits = limits or ForwardLimits.for_device(self.device)
        self.store_dtype = store_dtype
        self._layers = decoder_layers(self.decoder, aux_ids)
        check_head(self)

    @torch.inference_mode()
    def __call__(self, samples: Sequence[torch.Tensor]) -> list[States]:
        """States of each sample (int [S]); several samples must fit one chunk each, and are padded to the longest."""
        width = max(map(len, samples))
        if len(samples) > 1 and width > self.limits.chunk_tokens:
            raise ValueError(f"a batch of {len(samples)} samples holds one of {width} tokens; samples longer than a chunk go alone")
        ids = torch.zeros(len(samples), width, dtype=torch.long)
        for row, sample in zip(ids, samples, strict=True):
            row[: len(sample)] = sample
        aux, hidden = self._forward(ids.to(self.device))
        return [self._states(aux[i, : len(sample)], hidden[i, : len(sample)]) for i, sample in enumerate(samples)]

    def _forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [B, S] -> aux [B, S, A * H], hidden [B, S, H] on the CPU in the stored dtype."""
        chunks = ids.split(self.limits.chunk_tokens, dim=1)
        cache: Any = None
        hidden: list[torch.Tensor] = []
        with self._hooked() as taken:
            for chunk in chunks:
                output = self.decoder(input_ids=chunk, past_key_values=cache, use_cache=len(chunks) > 1)
                cache = output.past_key_values
                hidden.append(self._stored(output.last_hidden_state))
        return torch.cat([torch.cat(parts, dim=1) for parts in taken], dim=2), torch.cat(hidden, dim=1)

    def _stored(self, states: torch.Tensor) -> torch.Tensor:
        return states.to(self.store_dtype).cpu()

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[list[list[torch.Tensor]]]:
        """Lists that the aux layers' outputs [B, chunk, H] are appended to, one list a layer, in ascending order."""
        taken: list[list[torch.Tensor]] = [[] for _ in self._layers]

        def hook(parts: list[torch.Tensor]) -> Any:
            return lambda _module, _inputs, output: parts.append(self._stored(output if torch.is_tensor(output) else output[0]))

        handles = [layer.register_forward_hook(hook(parts)) for layer, parts in zip(self._layers, taken, strict=True)]
        try:
            yield taken
        finally:
            for handle in handles:
                handle.remove()

    def _states(self, aux: torch.Tensor, hidden: torch.Tensor) -> States:
        token_id, logsumexp = self.read_head(hidden)
        return States(aux.contiguous(), hidden.contiguous(), token_id, logsumexp)

    def read_head(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """argmax int32 [S] and log-sum-exp float32 [S] over the whole vocabulary, from the states [S, H] AS STORED: training
        computes its labels from those, so they must agree."""
        rows = max(1, LOGIT_BYTES // (4 * len(self.head)))
        ids, sums = [], []
        for part in hidden.split(rows):
            logits = head_logits(part.to(self.head.device), self.head)
            ids.append(logits.argmax(dim=1).to(torch.int32).cpu())
            sums.append(logits.logsumexp(dim=1).cpu())
        return torch.cat(ids), torch.cat(sums)


def head_logits(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """hidden [M, H] @ head [V, H]^T in float32.  Where both are bf16 on a GPU, the matrix units accumulate in float32."""
    if hidden.is_cuda and hidden.dtype == head.dtype and head.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden, head.t(), out_dtype=torch.float32)
    return hidden.float() @ head.float().t()


def decoder_layers(decoder: nn.Module, aux_ids: Sequence[int]) -> list[nn.Module]:
    """The modules whose outputs are captured."""
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(decoder).__name__} has no list of layers; only decoder language models can be captured")
    check_aux_ids(aux_ids, len(layers))
    return [layers[i] for i in aux_ids]


@torch.inference_mode()
def check_head(states: HiddenStates) -> None:
    """The draft is taught softmax(head @ h): refuse a target whose logits are anything else (scaled, capped, with a bias)."""
    ids = torch.arange(8, device=states.device)[None]
    output = states.decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
    expected = states.model(input_ids=ids, use_cache=False).logits[0].float()
    found = head_logits(output.to(states.head.dtype), states.head).to(expected.device)
    tolerance = 2e-2 if states.head.element_size() == 2 else 1e-4
    if (found - expected).norm() > tolerance * expected.norm():
        raise ValueError(
            f"{type(states.model).__name__} does not compute its logits as head @ final state (it scales or caps them, or adds a bias); "
            "a draft cannot be taught such labels"
        )


def load_model(folder: Path, dtype: str, device: str = "auto", attention: str = "sdpa") -> nn.Module:
    """The target on ``device`` (``auto``: the GPU where there is one; ``split``: its layers over all GPUs), in ``dtype``
    (``auto``: as it is stored). Raises ValueError, one sentence, where transformers cannot load it."""
    from transformers import AutoModelForCausalLM

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where: Any = "auto" if device == "split" else {"": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attention,
            device_map=None if device == "cpu" else where,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise ValueError(f"the target {folder} cannot be loaded by transformers: {str(error).splitlines()[0]}") from error
    log.info("target %s loaded on %s in %s, %s attention", folder, device, dtype, attention)
    return model
