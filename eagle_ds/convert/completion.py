"""From what a file holds to a sample fit for the store: checks first, then what the format lacks.

Nothing is mended in silence: a wrong shape, dtype, token, mask or state is a `Rejected` with a reason; the final norm, the
loss mask and the target's token are added only from a target and a dataset that the user named.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from eagle_ds.convert.formats import RawSample
from eagle_ds.convert.masks import ConversationMasks
from eagle_ds.convert.rejected import Reason, Rejected
from eagle_ds.store.format import TORCH_DTYPES, Sample
from eagle_ds.target.head import argmax_and_logsumexp

FinalNorm = Literal["auto", "apply", "skip"]

INTEGERS = (torch.int64, torch.int32, torch.int16)
CHECK_ROWS = 1024  # rows scanned at once for NaN and Inf: a few MB, stays in cache
RMS_ROWS = 64
RMS_TOLERANCE = 0.1
HEAD_VOCAB_ROWS = 8192  # rows of the head converted to float32 at once
HEAD_LOGIT_BYTES = 64 << 20  # logits computed at once: 2048 positions


@dataclass(frozen=True)
class Completer:
    """What every sample must be, and where to get what a format lacks. Pickles; reads weights when first needed."""

    hidden_size: int | None = None  # None: whatever the file has
    num_aux: int = 3
    dtype: str | None = None  # None: whatever the file has
    cast: bool = False  # other dtypes are cast to ``dtype``, because the user said so
    vocab_size: int | None = None
    target: Path | None = None
    final_norm: FinalNorm = "auto"  # auto: by format, and checked; apply, skip: the user's word
    token_facts: bool = False  # compute target_token_id and target_logsumexp with the target's head
    head_device: str = "cpu"
    masks: ConversationMasks | None = None

    def complete(self, sample_id: str, place: str, raw: RawSample) -> Sample:
        """The sample to store; raises `Rejected` naming ``place``."""
        self._check_sizes(place, raw)
        ids = self._check_ids(place, raw.input_ids)
        aux, last = self._states(place, raw)
        mask = self._mask(place, raw.loss_mask, ids)
        for name, states, cast in (("aux_hidden_state", raw.aux, aux), ("hidden_state", raw.last, last)):
            check_finite(place, name, states)
            if cast is not states:
                check_finite(place, name, cast, f"once cast: its value is beyond {self.dtype}; choose another --cast")
        normed = self._normed(place, last, raw.before_norm)
        if normed is not last:
            check_finite(place, "hidden_state", normed, "once normed; check --target and --final-norm")
        token, logsumexp = self._token_labels(place, raw, normed)
        return Sample(sample_id, ids, mask, aux, normed, token, logsumexp)

    def head(self) -> torch.Tensor | None:
        """The target's head [V, H] where token facts are to be computed."""
        if not self.token_facts or self.target is None or self.dtype is None:
            return None
        return _head(self.target, TORCH_DTYPES[self.dtype], self.head_device)

    def _check_sizes(self, place: str, raw: RawSample) -> None:
        num_tokens, width = raw.last.shape
        if num_tokens == 0:
            raise Rejected(place, Reason.EMPTY, "S = 0, expected at least one token")
        if self.hidden_size is not None and width != self.hidden_size:
            raise Rejected(place, Reason.HIDDEN_SIZE, f"hidden_state is {width} wide, the target and the other files {self.hidden_size}")
        if raw.aux.shape[1] != self.num_aux * width:
            detail = f"aux_hidden_state is {raw.aux.shape[1]} wide, expected {self.num_aux} layers of {width}"
            raise Rejected(place, Reason.WRONG_SHAPE, f"{detail}; name the layers with --aux-layer-ids")

    def _check_ids(self, place: str, ids: torch.Tensor) -> torch.Tensor:
        if ids.dtype not in INTEGERS:
            raise Rejected(place, Reason.DTYPE, f"input_ids are {ids.dtype}, expected integers")
        low, high = int(ids.min()), int(ids.max())
        limit = self.vocab_size or 2**31
        if low < 0 or high >= limit:
            raise Rejected(place, Reason.TOKEN_RANGE, f"input_ids reach from {low} to {high}, expected 0 to {limit - 1}")
        return ids.to(torch.int32)

    def _states(self, place: str, raw: RawSample) -> tuple[torch.Tensor, torch.Tensor]:
        """(aux, last) in the store's dtype; a cast only where the user asked for one."""
        known = tuple(TORCH_DTYPES.values())
        if raw.aux.dtype != raw.last.dtype or raw.last.dtype not in known:
            detail = f"aux_hidden_state is {raw.aux.dtype}, hidden_state {raw.last.dtype}"
            raise Rejected(place, Reason.DTYPE, f"{detail}, expected both bfloat16, float16 or float32")
        wanted = TORCH_DTYPES[self.dtype] if self.dtype else raw.last.dtype
        if raw.last.dtype != wanted and not self.cast:
            detail = f"hidden states are {raw.last.dtype}, the store holds {wanted}"
            raise Rejected(place, Reason.DTYPE, f"{detail}; --cast {self.dtype} converts them, with rounding")
        return raw.aux.to(wanted), raw.last.to(wanted)

    def _mask(self, place: str, mask: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
        if mask is None:
            if self.masks is None:
                detail = "no loss_mask; give the conversations with --dataset and the tokenizer with --target"
                raise Rejected(place, Reason.MISSING_KEY, detail)
            return self._mask_from_dataset(place, self.masks, ids)
        if mask.is_complex():
            raise Rejected(place, Reason.DTYPE, f"loss_mask is {mask.dtype}, expected 0 and 1 as integers, booleans or real numbers")
        wide = mask.to(torch.float32) if mask.is_floating_point() else mask
        if not bool(((wide == 0) | (wide == 1)).all()):
            raise Rejected(place, Reason.MASK, f"loss_mask holds {float(wide.min()):g} to {float(wide.max()):g}, expected only 0 and 1")
        return mask.to(torch.uint8)

    def _mask_from_dataset(self, place: str, masks: ConversationMasks, ids: torch.Tensor) -> torch.Tensor:
        found = masks.find(ids.numpy())
        if found is None:
            detail = f"no conversation in {masks.path.name} renders to these {len(ids)} tokens (they begin {ids[:6].tolist()})"
            raise Rejected(place, Reason.MASK, f"{detail}; check --dataset, --target and --max-length")
        return torch.from_numpy(found)

    def _normed(self, place: str, last: torch.Tensor, before_norm: bool) -> torch.Tensor:
        """What the head reads. With a target at hand, states that are said to be normed are checked to be, and vice versa."""
        apply = before_norm if self.final_norm == "auto" else self.final_norm == "apply"
        norm = None if self.target is None or self.final_norm == "skip" else _final_norm(self.target)
        if norm is None and apply:
            detail = "hidden_state is from before the target's final norm; give that norm's weight with --target"
            if self.target is not None:
                detail = f"hidden_state is from before the final norm, and that of {self.target} is no RMSNorm; use --final-norm skip"
            raise Rejected(place, Reason.FINAL_NORM, detail)
        if norm is not None and self.final_norm == "auto":
            _check_normed(place, norm, last, expected=not apply)
        return norm(last) if norm is not None and apply else last

    def _token_labels(self, place: str, raw: RawSample, last: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if (head := self.head()) is not None:
            return token_labels(last, head)
        for name, kinds in (("target_token_id", INTEGERS), ("target_logsumexp", (torch.float32,))):
            found = getattr(raw, name)
            if found is not None and (found.dtype not in kinds or found.shape != raw.input_ids.shape):
                detail = f"{name} is {found.dtype} {list(found.shape)}, expected {kinds[0]} {list(raw.input_ids.shape)}"
                raise Rejected(place, Reason.WRONG_SHAPE, f"{detail}; check --map")
        return None if raw.target_token_id is None else raw.target_token_id.to(torch.int32), raw.target_logsumexp


@dataclass(frozen=True)
class FinalRmsNorm:
    """The target's last RMSNorm, computed as transformers does: statistics in fp32, the weight in the states' dtype."""

    weight: torch.Tensor  # [H]
    eps: float
    one_plus: bool  # Gemma multiplies by 1 + weight, in fp32

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """[S, H] -> [S, H], a block of rows at a time."""
        out = torch.empty_like(states, memory_format=torch.contiguous_format)
        for rows in _blocks(len(states), CHECK_ROWS):
            wide = states[rows].float()
            wide *= torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
            out[rows] = wide * (1 + self.weight.float()) if self.one_plus else wide.to(states.dtype) * self.weight.to(states.dtype)
        return out

    def rms_without(self, states: torch.Tensor) -> float:
        """Median over rows of the RMS that is left when the weight is divided out: 1 for normed states."""
        scale = self.weight.float() + float(self.one_plus)
        large = scale.abs() > 0.05 * scale.abs().median()
        return float((states[:, large].float() / scale[large]).square().mean(-1).sqrt().median())


def _check_normed(place: str, norm: FinalRmsNorm, last: torch.Tensor, expected: bool) -> None:
    looks_normed = abs(norm.rms_without(last[:: max(1, len(last) // RMS_ROWS)]) - 1) < RMS_TOLERANCE
    if looks_normed != expected:
        where, mend = ("after", "apply") if expected else ("before", "skip")
        detail = f"hidden_state does not look like states from {where} the target's final norm"
        raise Rejected(place, Reason.FINAL_NORM, f"{detail}; check --target, or say --final-norm {mend}")


def check_finite(place: str, name: str, states: torch.Tensor, mend: str = "expected finite numbers; capture it again") -> None:
    """Raise `Rejected` at the first row with a NaN or Inf. min and max carry both, at memory speed."""
    for rows in _blocks(len(states), CHECK_ROWS):
        low, high = torch.aminmax(states[rows])
        if not (torch.isfinite(low) and torch.isfinite(high)):
            row = rows.start + int((~torch.isfinite(states[rows])).any(-1).nonzero()[0])
            raise Rejected(place, Reason.NOT_FINITE, f"{name} has a NaN or Inf in row {row}, {mend}")


def token_labels(hidden: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what a store holds of the target's logits: argmax int32 [S] and log-sum-exp float32 [S], on the CPU.

    hidden [S, H], head [V, H]. On a CPU blocks of the head are converted to float32, never the whole head.
    """
    token, logsumexp = argmax_and_logsumexp(hidden, head, HEAD_LOGIT_BYTES, vocab_rows=HEAD_VOCAB_ROWS)
    return token.to(torch.int32).cpu(), logsumexp.cpu()


def _blocks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


@functools.cache
def _final_norm(target: Path) -> FinalRmsNorm | None:
    """None where the target's last norm is of another kind: then nothing can be checked or applied."""
    from eagle_ds.target.files import TargetInfo, load_target_weights, read_config

    if "rms_norm_eps" not in read_config(target):
        return None
    info = TargetInfo.from_folder(target)
    weight = load_target_weights(target, names=("norm",))["norm"]
    return FinalRmsNorm(weight, info.rms_norm_eps, one_plus=info.model_type.startswith("gemma"))


@functools.cache
def _head(target: Path, states: torch.dtype, device: str) -> torch.Tensor:
    """The head as it was when it made these states: weights stored in float32 are rounded to what the model ran in."""
    from eagle_ds.target.files import load_target_weights

    head = load_target_weights(target, names=("lm_head",))["lm_head"]
    return (head.to(states) if head.dtype == torch.float32 else head).to(device)
