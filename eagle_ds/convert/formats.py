"""The feature files that other projects write, each read into one `RawSample`.

=================  ==========================================================================================
SpecForge          ``rows_*/data_*.ckpt[.gz]``: input_ids [S], loss_mask [S], hidden_state [1, S, H], aux_hidden_state [1, S, A*H]
Model-Optimizer    ``*.pt``: input_ids, hidden_states [S, H], aux_hidden_states [S, A*H], and often loss_mask
speculators        ``hs_*.safetensors``: token_ids [S], hidden_states [S, A+1, H]; the last state is BEFORE the final norm
HDF5               this project's own schema, or any other through ``--map`` (data/importers/hdf5_files.py)
=================  ==========================================================================================

The tensors of a `RawSample` are views of the mapped file; nothing is copied here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from eagle_ds.convert.rejected import Reason, Rejected
from eagle_ds.convert.torch_files import load_torch

IDS_NAMES = ("input_ids", "token_ids")
AUX_NAMES = ("aux_hidden_state", "aux_hidden_states")
LAST_NAMES = ("hidden_state", "hidden_states")


@dataclass
class RawSample:
    """What a file holds, in canonical shapes and its own dtypes."""

    input_ids: torch.Tensor  # [S]
    aux: torch.Tensor  # [S, A*H]
    last: torch.Tensor  # [S, H]
    loss_mask: torch.Tensor | None = None  # [S]
    before_norm: bool = False  # ``last`` has not passed the target's final norm
    target_token_id: torch.Tensor | None = None  # [S]
    target_logsumexp: torch.Tensor | None = None  # [S]

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden states."""
        return self.aux.nbytes + self.last.nbytes


def read_torch(path: Path, checksums: bool = True) -> RawSample:
    """SpecForge's and Model-Optimizer's dicts, plain or gzipped."""
    tensors = load_torch(path, checksums)
    mask = _mask(path, tensors)
    return canonical(path, _pick(path, tensors, IDS_NAMES), _pick(path, tensors, AUX_NAMES), _pick(path, tensors, LAST_NAMES), mask)


def read_safetensors(path: Path) -> RawSample:
    """speculators' files: all states of a token side by side, the last one before the final norm."""
    try:
        with safe_open(path, framework="pt") as archive:
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        reason = Reason.TRUNCATED if "incomplete" in str(error).lower() or path.stat().st_size < 8 else Reason.CORRUPT
        raise Rejected(path, reason, f"not a whole safetensors file ({error}); write it again") from error
    states = _pick(path, tensors, LAST_NAMES)
    if states.dim() != 3 or states.shape[1] < 2:
        found = list(states.shape)
        raise Rejected(path, Reason.WRONG_SHAPE, f"hidden_states is {found}, expected [S, A+1, H] with the last state after the aux ones")
    ids, mask = _pick(path, tensors, IDS_NAMES), _mask(path, tensors)
    raw = canonical(path, ids, states[:, :-1].flatten(1), states[:, -1], mask)
    raw.before_norm = True
    return raw


def canonical(path: Path | str, ids: torch.Tensor, aux: torch.Tensor, last: torch.Tensor, mask: torch.Tensor | None) -> RawSample:
    """Drop the batch dimension of one that some formats carry, and check that all lengths agree."""
    ids, mask = _drop_batch(ids, 1), None if mask is None else _drop_batch(mask, 1)
    aux = _drop_batch(aux.flatten(2) if aux.dim() == 4 else aux, 2)
    last = _drop_batch(last, 2)
    if ids.dim() != 1 or aux.dim() != 2 or last.dim() != 2:
        shapes = f"input_ids {list(ids.shape)}, aux_hidden_state {list(aux.shape)}, hidden_state {list(last.shape)}"
        raise Rejected(path, Reason.WRONG_SHAPE, f"{shapes}; expected [S], [S, A*H] and [S, H], one sample a file")
    lengths = {"input_ids": len(ids), "aux_hidden_state": len(aux), "hidden_state": len(last)}
    if mask is not None:
        lengths["loss_mask"] = mask.numel() if mask.dim() == 1 else -1
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length if length >= 0 else 'of another shape'}" for name, length in lengths.items())
        raise Rejected(path, Reason.WRONG_SHAPE, f"lengths disagree: {found}; expected one length S")
    return RawSample(ids, aux, last, mask)


def _drop_batch(tensor: torch.Tensor, dims: int) -> torch.Tensor:
    return tensor[0] if tensor.dim() == dims + 1 and tensor.shape[0] == 1 else tensor


def _mask(path: Path, tensors: Mapping[str, Any]) -> torch.Tensor | None:
    return None if tensors.get("loss_mask") is None else _pick(path, tensors, ("loss_mask",))


def _pick(path: Path, tensors: Mapping[str, Any], names: Sequence[str]) -> torch.Tensor:
    for name in names:
        if name in tensors:
            tensor = tensors[name]
            if not isinstance(tensor, torch.Tensor):
                raise Rejected(path, Reason.DTYPE, f"{name} is a {type(tensor).__name__}, expected a tensor")
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
                raise Rejected(path, Reason.DTYPE, f"{name} is a sparse, quantized, nested or empty-shell tensor, expected a plain one")
            return tensor
    raise Rejected(path, Reason.MISSING_KEY, f"no {' or '.join(names)}; the file holds {', '.join(sorted(map(str, tensors))) or 'nothing'}")
