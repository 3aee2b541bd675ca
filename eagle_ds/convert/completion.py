"""Check a RawSample, and add what its format lacks: the result can be stored.

Nothing is repaired silently. A wrong shape, dtype, token, mask or state raises `Rejected` with a reason. The
final norm, the loss mask, and argmax and log-sum-exp of the target's logits are added only from a target and
a dataset that the user named.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from eagle_ds.convert.formats import RawSample, Reason, Rejected
from eagle_ds.convert.masks import ConversationMasks
from eagle_ds.store.format import TORCH_DTYPES, Sample
from eagle_ds.target.files import load_target_weights, read_config
from eagle_ds.target.head import argmax_and_logsumexp
from eagle_ds.target.info import TargetInfo

FinalNorm = Literal["auto", "apply", "skip"]

INTEGERS = (torch.int64, torch.int32, torch.int16)
CHECK_ROWS = 1024  # rows scanned at once for NaN and Inf: a few MB, stays in the processor's cache
RMS_ROWS = 64  # rows of a sample that show whether its states passed the final norm
RMS_TOLERANCE = 0.1
HEAD_VOCAB_ROWS = 8192  # rows of the head converted to float32 at once
HEAD_LOGIT_BYTES = 64 << 20  # logits computed at once: 2048 positions


@dataclass(frozen=True)
class Completer:
    """The rules that every sample must meet, and the sources of what a format lacks.

    It can be pickled, because weights are loaded at their first use.
    """

    hidden_size: int | None = None  # None: as in the file
    num_aux: int = 3
    dtype: str | None = None  # None: as in the file
    cast: bool = False  # convert other dtypes to ``dtype``
    vocab_size: int | None = None
    target: Path | None = None
    final_norm: FinalNorm = "auto"  # auto: apply it if the format needs it, and check; else the user's choice
    token_labels: bool = False  # compute target_token_id and target_logsumexp with the target's head
    head_device: str = "cpu"
    masks: ConversationMasks | None = None

    def complete(self, sample_id: str, raw: RawSample) -> Sample:
        """Return the sample to store. Raises `Rejected`."""
        self._check_sizes(raw)
        ids = self._check_ids(raw.input_ids)
        aux, last = self._states(raw)
        mask = self._loss_mask(raw.loss_mask, ids)
        for name, states, cast in (("aux_hidden_state", raw.aux, aux), ("hidden_state", raw.last, last)):
            check_finite(name, states)
            if cast is not states:
                advice = f"once cast: its value is beyond {self.dtype}; choose another --cast"
                check_finite(name, cast, advice)
        normed = self._apply_norm(last, raw.before_norm)
        if normed is not last:
            check_finite("hidden_state", normed, "after the final norm; check --target and --final-norm")
        token, logsumexp = self._token_labels(raw, normed)
        return Sample(sample_id, ids, mask, aux, normed, token, logsumexp)

    def head(self) -> torch.Tensor | None:
        """Load the target's head [V, H]; None if argmax and log-sum-exp are not to be computed."""
        if not self.token_labels or self.target is None or self.dtype is None:
            return None
        return _load_head(self.target, TORCH_DTYPES[self.dtype], self.head_device)

    def _check_sizes(self, raw: RawSample) -> None:
        num_tokens, width = raw.last.shape
        if num_tokens == 0:
            raise Rejected(Reason.EMPTY, "S = 0, expected at least one token")
        if self.hidden_size is not None and width != self.hidden_size:
            detail = f"hidden_state is {width} wide, the target and the other files {self.hidden_size}"
            raise Rejected(Reason.HIDDEN_SIZE, detail)
        if raw.aux.shape[1] != self.num_aux * width:
            detail = f"aux_hidden_state is {raw.aux.shape[1]} wide, expected {self.num_aux} layers of {width}"
            raise Rejected(Reason.WRONG_SHAPE, f"{detail}; name the layers with --aux-layer-ids")

    def _check_ids(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.dtype not in INTEGERS:
            raise Rejected(Reason.DTYPE, f"input_ids are {ids.dtype}, expected integers")
        low, high = int(ids.min()), int(ids.max())
        limit = self.vocab_size or 2**31
        if low < 0 or high >= limit:
            detail = f"input_ids range from {low} to {high}, expected 0 to {limit - 1}"
            raise Rejected(Reason.TOKEN_RANGE, detail)
        return ids.to(torch.int32)

    def _states(self, raw: RawSample) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (aux, last) in the store's dtype. They are cast only if the user asked for it."""
        if raw.aux.dtype != raw.last.dtype or raw.last.dtype not in TORCH_DTYPES.values():
            detail = f"aux_hidden_state is {raw.aux.dtype}, hidden_state {raw.last.dtype}"
            raise Rejected(Reason.DTYPE, f"{detail}, expected both bfloat16, float16 or float32")
        wanted = TORCH_DTYPES[self.dtype] if self.dtype else raw.last.dtype
        if raw.last.dtype != wanted and not self.cast:
            detail = f"hidden states are {raw.last.dtype}, the store holds {wanted}"
            raise Rejected(Reason.DTYPE, f"{detail}; --cast {self.dtype} converts them, with rounding")
        return raw.aux.to(wanted), raw.last.to(wanted)

    def _loss_mask(self, mask: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
        """Return the file's loss mask as uint8 [S], or that of the conversation with these tokens."""
        if mask is None:
            return self._mask_from_dataset(ids)
        if mask.is_complex():
            detail = f"loss_mask is {mask.dtype}, expected 0 and 1 as integers, booleans or real numbers"
            raise Rejected(Reason.DTYPE, detail)
        wide = mask.to(torch.float32) if mask.is_floating_point() else mask
        if not bool(((wide == 0) | (wide == 1)).all()):
            detail = f"loss_mask holds {float(wide.min()):g} to {float(wide.max()):g}, expected only 0 and 1"
            raise Rejected(Reason.MASK, detail)
        return mask.to(torch.uint8)

    def _mask_from_dataset(self, ids: torch.Tensor) -> torch.Tensor:
        if self.masks is None:
            detail = "no loss_mask; give the conversations with --dataset and the tokenizer with --target"
            raise Rejected(Reason.MISSING_KEY, detail)
        found = self.masks.find(ids.numpy())
        if found is None:
            tokens = f"these {len(ids)} tokens (they begin with {ids[:6].tolist()})"
            detail = f"no conversation in {self.masks.path.name} renders to {tokens}"
            raise Rejected(Reason.MASK, f"{detail}; check --dataset, --target and --max-length")
        return torch.from_numpy(found)

    def _apply_norm(self, last: torch.Tensor, before_norm: bool) -> torch.Tensor:
        """Return the states that the head reads: ``last``, or ``last`` after the target's final norm.

        If the target is known, check on the states themselves that they were taken before or after the norm,
        as the format says. A draft trained on the wrong ones would learn noise.
        """
        apply = before_norm if self.final_norm == "auto" else self.final_norm == "apply"
        norm = None if self.target is None or self.final_norm == "skip" else _load_final_norm(self.target)
        if norm is None and apply:
            advice = "give that norm's weight with --target"
            if self.target is not None:
                advice = f"the final norm of {self.target} is no RMSNorm, so use --final-norm skip"
            detail = f"hidden_state is from before the target's final norm; {advice}"
            raise Rejected(Reason.FINAL_NORM, detail)
        if norm is not None and self.final_norm == "auto":
            _check_side_of_norm(norm, last, is_normed=not apply)
        return norm(last) if norm is not None and apply else last

    def _token_labels(
        self, raw: RawSample, last: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return argmax and log-sum-exp of the target's logits: computed, from the file, or None."""
        if (head := self.head()) is not None:
            return token_labels(last, head)
        for name, kinds in (("target_token_id", INTEGERS), ("target_logsumexp", (torch.float32,))):
            found = getattr(raw, name)
            if found is not None and (found.dtype not in kinds or found.shape != raw.input_ids.shape):
                expected = f"expected {kinds[0]} {list(raw.input_ids.shape)}"
                detail = f"{name} is {found.dtype} {list(found.shape)}, {expected}; check --map"
                raise Rejected(Reason.WRONG_SHAPE, detail)
        token = raw.target_token_id
        return None if token is None else token.to(torch.int32), raw.target_logsumexp


@dataclass(frozen=True)
class FinalRmsNorm:
    """The target's last RMSNorm, bit for bit as in transformers: the mean square is computed in fp32."""

    weight: torch.Tensor  # [H]
    eps: float
    one_plus: bool  # Gemma multiplies by 1 + weight, in fp32

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Norm states [S, H], a few rows at a time."""
        out = torch.empty_like(states, memory_format=torch.contiguous_format)
        for rows, result in zip(states.split(CHECK_ROWS), out.split(CHECK_ROWS), strict=True):
            normed = rows.float()
            normed *= torch.rsqrt(normed.square().mean(-1, keepdim=True) + self.eps)
            if self.one_plus:
                result.copy_(normed * (1 + self.weight.float()))
            else:
                result.copy_(normed.to(states.dtype) * self.weight.to(states.dtype))
        return out

    def rms_without_weight(self, states: torch.Tensor) -> float:
        """Divide the states by the norm's weight and return the median RMS of their rows.

        It is about 1 if the states are normed. Channels with a weight near zero are left out, because
        dividing by it would amplify rounding errors.
        """
        scale = self.weight.float() + float(self.one_plus)
        large = scale.abs() > 0.05 * scale.abs().median()
        return float((states[:, large].float() / scale[large]).square().mean(-1).sqrt().median())


def _check_side_of_norm(norm: FinalRmsNorm, last: torch.Tensor, is_normed: bool) -> None:
    """Raise `Rejected` unless a few rows of the sample look normed, or not normed, as ``is_normed`` says."""
    some_rows = last[:: max(1, len(last) // RMS_ROWS)]
    looks_normed = abs(norm.rms_without_weight(some_rows) - 1) < RMS_TOLERANCE
    if looks_normed != is_normed:
        side, flag = ("after", "apply") if is_normed else ("before", "skip")
        detail = f"hidden_state does not look like states from {side} the target's final norm"
        raise Rejected(Reason.FINAL_NORM, f"{detail}; check --target, or use --final-norm {flag}")


def check_finite(
    name: str, states: torch.Tensor, advice: str = "expected finite numbers; capture it again"
) -> None:
    """Raise `Rejected` at the first row of ``states`` [S, width] with a NaN or Inf."""
    for number, rows in enumerate(states.split(CHECK_ROWS)):
        # A NaN or Inf shows in the minimum or maximum; finding these two is limited by memory speed only.
        low, high = torch.aminmax(rows)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            row = number * CHECK_ROWS + int((~torch.isfinite(rows)).any(-1).nonzero()[0])
            raise Rejected(Reason.NOT_FINITE, f"{name} has a NaN or Inf in row {row}, {advice}")


def token_labels(hidden: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute argmax int32 [S] and log-sum-exp float32 [S] of the target's logits, returned on the CPU.

    Args:
        hidden: [S, H].
        head: [V, H]. On a CPU it is converted to float32 block by block, never as a whole.
    """
    token, logsumexp = argmax_and_logsumexp(hidden, head, HEAD_LOGIT_BYTES, vocab_rows=HEAD_VOCAB_ROWS)
    return token.to(torch.int32).cpu(), logsumexp.cpu()


@functools.cache
def _load_final_norm(target: Path) -> FinalRmsNorm | None:
    """Load the target's last norm; None if it is not an RMSNorm, so it cannot be checked or applied."""
    if "rms_norm_eps" not in read_config(target):
        return None
    info = TargetInfo.from_folder(target)
    weight = load_target_weights(target, names=("norm",))["norm"]
    return FinalRmsNorm(weight, info.rms_norm_eps, one_plus=info.model_type.startswith("gemma"))


@functools.cache
def _load_head(target: Path, states: torch.dtype, device: str) -> torch.Tensor:
    """Load the head in the dtype that the model ran in: float32 weights are rounded to the states' dtype."""
    head = load_target_weights(target, names=("lm_head",))["lm_head"]
    return (head.to(states) if head.dtype == torch.float32 else head).to(device)
