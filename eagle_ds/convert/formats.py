"""The formats that can be read, RawSample (what a reader returns) and Rejected (why a file cannot be read).

SpecForge
    ``rows_*/data_*.ckpt[.gz]``, a torch dict of one sample:
    input_ids [S], loss_mask [S], hidden_state [1, S, H], aux_hidden_state [1, S, A*H]
Model-Optimizer
    ``*.pt``, a torch dict: input_ids, hidden_states [S, H], aux_hidden_states [S, A*H], and often loss_mask
speculators
    ``hs_*.safetensors``: token_ids [S], hidden_states [S, A+1, H]. The last state is BEFORE the target's
    final norm, and there is no loss mask
HDF5
    this project's own schema, or any other that ``--map`` describes (hdf5_files.py)

The tensors of a `RawSample` are views of the mapped file; nothing is copied here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

IDS_NAMES = ("input_ids", "token_ids")
AUX_NAMES = ("aux_hidden_state", "aux_hidden_states")
LAST_NAMES = ("hidden_state", "hidden_states")


class Reason(StrEnum):
    """Why a file was rejected, as a category; the summary counts by these."""

    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    UNSAFE = "unsafe pickle"
    UNREADABLE = "unreadable"
    MISSING_KEY = "missing key"
    WRONG_SHAPE = "wrong shape"
    EMPTY = "no tokens"
    DTYPE = "dtype"
    HIDDEN_SIZE = "hidden size differs"
    NOT_FINITE = "NaN or Inf"
    TOKEN_RANGE = "token ids"
    MASK = "loss mask"
    FINAL_NORM = "final norm"
    DUPLICATE = "duplicate id"
    READBACK = "read-back differs"
    FAILED = "conversion failed"
    WORKER = "worker died"


class Rejected(ValueError):
    """One sample that cannot be converted: the reason, what was found and expected, and its path.

    Readers and checks raise this without a path. The caller, who knows the path, sets it with `at`.
    """

    def __init__(self, reason: Reason, detail: str, path: Path | str = "") -> None:
        super().__init__(reason, detail, path)  # all arguments, so that it pickles
        self.reason = reason
        self.detail = detail
        self.path = printable(str(path))

    def at(self, path: Path | str) -> Rejected:
        """Set the path, and return this error."""
        self.path = printable(str(path))
        return self

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}: {self.detail}"


def printable(text: str) -> str:
    """Return a file name fit for JSON and terminals: bytes that are not UTF-8 become backslash escapes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@dataclass
class RawSample:
    """What one source file or group holds, in canonical shapes and in its own dtypes."""

    input_ids: torch.Tensor  # [S]
    aux: torch.Tensor  # [S, A*H]
    last: torch.Tensor  # [S, H]
    loss_mask: torch.Tensor | None = None  # [S]
    before_norm: bool = False  # ``last`` was taken before the target's final norm
    target_token_id: torch.Tensor | None = None  # [S]
    target_logsumexp: torch.Tensor | None = None  # [S]

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden states."""
        return self.aux.nbytes + self.last.nbytes


def from_torch_dict(tensors: Mapping[str, Any]) -> RawSample:
    """Read the dict that SpecForge or Model-Optimizer saved. Raises `Rejected`."""
    mask = _loss_mask(tensors)
    return canonical(*(_find_tensor(tensors, names) for names in (IDS_NAMES, AUX_NAMES, LAST_NAMES)), mask)


def read_safetensors(path: Path) -> RawSample:
    """Read a file of speculators: [S, A+1, H], the aux states and last the state before the final norm."""
    try:
        with safe_open(path, framework="pt") as archive:
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        is_short = "incomplete" in str(error).lower() or path.stat().st_size < 8
        reason = Reason.TRUNCATED if is_short else Reason.CORRUPT
        raise Rejected(reason, f"not a whole safetensors file ({error}); write it again") from error
    states = _find_tensor(tensors, LAST_NAMES)
    if states.dim() != 3 or states.shape[1] < 2:
        expected = "expected [S, A+1, H] with the final state after the aux ones"
        raise Rejected(Reason.WRONG_SHAPE, f"hidden_states is {list(states.shape)}, {expected}")
    ids, mask = _find_tensor(tensors, IDS_NAMES), _loss_mask(tensors)
    raw = canonical(ids, states[:, :-1].flatten(1), states[:, -1], mask)
    raw.before_norm = True
    return raw


def canonical(
    ids: torch.Tensor, aux: torch.Tensor, last: torch.Tensor, mask: torch.Tensor | None
) -> RawSample:
    """Drop the batch dimension of size 1 that some formats carry, and check that all lengths agree."""
    ids = _drop_batch(ids, 1)
    mask = None if mask is None else _drop_batch(mask, 1)
    aux = _drop_batch(aux.flatten(2) if aux.dim() == 4 else aux, 2)
    last = _drop_batch(last, 2)
    if ids.dim() != 1 or aux.dim() != 2 or last.dim() != 2:
        found = {"input_ids": ids, "aux_hidden_state": aux, "hidden_state": last}
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in found.items())
        expected = "expected [S], [S, A*H] and [S, H], one sample a file"
        raise Rejected(Reason.WRONG_SHAPE, f"{shapes}; {expected}")
    lengths = {"input_ids": len(ids), "aux_hidden_state": len(aux), "hidden_state": len(last)}
    if mask is not None:
        lengths["loss_mask"] = mask.numel() if mask.dim() == 1 else -1
    if len(set(lengths.values())) > 1:
        found = (f"{name} {size if size >= 0 else 'of another shape'}" for name, size in lengths.items())
        raise Rejected(Reason.WRONG_SHAPE, f"lengths disagree: {', '.join(found)}; expected one length S")
    return RawSample(ids, aux, last, mask)


def _drop_batch(tensor: torch.Tensor, dims: int) -> torch.Tensor:
    return tensor[0] if tensor.dim() == dims + 1 and tensor.shape[0] == 1 else tensor


def _loss_mask(tensors: Mapping[str, Any]) -> torch.Tensor | None:
    return None if tensors.get("loss_mask") is None else _find_tensor(tensors, ("loss_mask",))


def _find_tensor(tensors: Mapping[str, Any], names: Sequence[str]) -> torch.Tensor:
    """Return the tensor under the first of ``names`` that exists. Raises `Rejected` unless it is a plain one.
    """
    name = next((name for name in names if name in tensors), None)
    if name is None:
        listing = ", ".join(sorted(map(str, tensors))) or "nothing"
        raise Rejected(Reason.MISSING_KEY, f"no {' or '.join(names)}; the file holds {listing}")
    tensor = tensors[name]
    if not isinstance(tensor, torch.Tensor):
        raise Rejected(Reason.DTYPE, f"{name} is a {type(tensor).__name__}, expected a tensor")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        detail = f"{name} is a sparse, quantized, nested or meta tensor, expected a plain one"
        raise Rejected(Reason.DTYPE, detail)
    return tensor
