"""Read HDF5 files: this project's own schema, or another one that ``--map`` describes.

A map gives the path of each of our datasets in the other file: pairs ``OURS=THEIRS`` joined by commas.

    input_ids=tokens,loss_mask=mask,aux_hidden_state=layer_1+layer_15+layer_28,hidden_state=final@bf16

``A+B+C``
    concatenates datasets along their last dimension.
``@bf16``
    means that the dataset's 16-bit integers are the bits of bfloat16. h5py has no bfloat16, so many files
    store it this way.
``*``
    as a whole path component matches every group at that place; each group is one sample, as in
    ``samples/*/tokens``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

from eagle_ds.convert.formats import RawSample, Reason, Rejected, canonical

REQUIRED = ("input_ids", "aux_hidden_state", "hidden_state")
OPTIONAL = ("loss_mask", "target_token_id", "target_logsumexp")
BF16_MARK = "@bf16"


@dataclass(frozen=True)
class Hdf5Map:
    """Pairs of our dataset name and its path in the file, as written in ``--map``."""

    places: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, text: str) -> Hdf5Map:
        """Parse ``--map``. Raises ValueError for a name that is unknown, repeated or missing."""
        places: dict[str, str] = {}
        for pair in filter(None, (part.strip() for part in text.split(","))):
            ours, equals, theirs = (part.strip() for part in pair.partition("="))
            if not equals or not theirs or ours not in REQUIRED + OPTIONAL:
                names = ", ".join(REQUIRED + OPTIONAL)
                raise ValueError(f"--map entry {pair!r} is not NAME=PATH with NAME one of {names}")
            if ours in places:
                raise ValueError(f"--map names {ours} twice; name it once")
            places[ours] = theirs
        if missing := [name for name in REQUIRED if name not in places]:
            raise ValueError(f"--map does not name {', '.join(missing)}; add {missing[0]}=PATH")
        return cls(tuple(places.items()))

    @property
    def group_pattern(self) -> str | None:
        """The path that precedes ``*``; None if the map has no ``*``, so a file is one sample."""
        before, star, _ = dict(self.places)["input_ids"].partition("*")
        return before if star else None


IDENTITY = Hdf5Map(tuple((name, name) for name in REQUIRED + OPTIONAL))


def sample_groups(path: Path, mapping: Hdf5Map) -> Iterator[str]:
    """Yield the groups that ``*`` stands for, or one empty name if the file is one sample.

    Raises `Rejected`.
    """
    if mapping.group_pattern is None:
        yield ""
        return
    with _open(path) as file:
        parent = file.get(mapping.group_pattern.rstrip("/") or "/")
        if not isinstance(parent, h5py.Group):
            detail = f"no group {mapping.group_pattern!r} to look for samples in; check --map"
            raise Rejected(Reason.MISSING_KEY, detail)
        names = [name for name in parent if isinstance(parent.get(name), h5py.Group)]
    yield from sorted(names, key=natural_key)


def read_hdf5(path: Path, mapping: Hdf5Map, group: str = "") -> RawSample:
    """Read one sample. Raises `Rejected` if something is missing or damaged."""
    paths = {ours: theirs.replace("*", group) for ours, theirs in mapping.places}
    with _open(path) as file:
        try:
            present = {ours: theirs for ours, theirs in paths.items() if _has_datasets(file, theirs)}
            found = {ours: _read_joined(file, theirs) for ours, theirs in present.items()}
        except OSError as error:
            raise Rejected(Reason.CORRUPT, f"HDF5 cannot read it ({error})") from error
        listing = ", ".join(sorted(file)) or "nothing"
    for ours in REQUIRED:
        if ours not in found:
            detail = f"no dataset {paths[ours]} for {ours}, the file holds {listing}; use --map"
            raise Rejected(Reason.MISSING_KEY, detail)
    raw = canonical(*(found[name] for name in REQUIRED), found.get("loss_mask"))
    raw.target_token_id = found.get("target_token_id")
    raw.target_logsumexp = found.get("target_logsumexp")
    return raw


def natural_key(text: str) -> list[str | int]:
    """Sort key that puts data_2 before data_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        reason = Reason.TRUNCATED if "truncated" in str(error) else Reason.UNREADABLE
        raise Rejected(reason, f"HDF5 cannot open it ({error})") from error


def _has_datasets(file: h5py.File, theirs: str) -> bool:
    names = theirs.removesuffix(BF16_MARK).split("+")
    return all(isinstance(file.get(name), h5py.Dataset) for name in names)


def _read_joined(file: h5py.File, theirs: str) -> torch.Tensor:
    """Read ``A+B+C[@bf16]``: the datasets side by side."""
    as_bf16 = theirs.endswith(BF16_MARK)
    parts = [_read_raw(file[name], as_bf16) for name in theirs.removesuffix(BF16_MARK).split("+")]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _read_raw(dataset: h5py.Dataset, as_bf16: bool) -> torch.Tensor:
    """Read a dataset bit for bit. bfloat16 is read as integers, because h5py would convert it to float32."""
    if as_bf16 or _is_bf16(dataset):
        if dataset.dtype.itemsize != 2 and not _is_bf16(dataset):
            detail = f"{dataset.name} is {dataset.dtype}, expected 16-bit numbers for {BF16_MARK}"
            raise Rejected(Reason.DTYPE, detail)
        bits = np.empty(dataset.shape, np.uint16)
        if bits.size:
            # The memory type is the file's own type: HDF5 then copies the bytes and converts nothing.
            dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, bits, dataset.id.get_type())
        return torch.from_numpy(bits).view(torch.bfloat16)
    values = dataset[()]
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        detail = f"{dataset.name} holds {dataset.dtype}, expected numbers; bfloat16 bits need {BF16_MARK}"
        raise Rejected(Reason.DTYPE, detail)
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False))


def _is_bf16(dataset: h5py.Dataset) -> bool:
    """Return whether the HDF5 type is bfloat16: a float of 2 bytes whose exponent (field 2) has 8 bits."""
    kind = dataset.id.get_type()
    return isinstance(kind, h5py.h5t.TypeFloatID) and kind.get_size() == 2 and kind.get_fields()[2] == 8
