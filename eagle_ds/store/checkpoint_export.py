"""Export samples of a store to the .ckpt files of SpecForge, so that its trainer can read the same data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from eagle_ds.store.reader import SampleReader
from eagle_ds.store.store import Store

GROUP_SIZE = 5000  # samples per folder, as SpecForge groups them


def export_checkpoints(path: str | Path, out: str | Path, ids: Sequence[str] | None = None) -> Iterator[Path]:
    """Write samples as ``rows_0-5000/data_0.ckpt``, ``data_1.ckpt``, ... below ``out`` and yield each path.

    Args:
        path: a store or one .h5 file.
        out: the folder to write to.
        ids: export these samples only. A sample keeps the number of its line in the manifest either way.

    Raises:
        ValueError: an id is not in the store.
        OSError: a file cannot be written.

    The format has no place for ``target_token_id`` and ``target_logsumexp``; they are left out.
    """
    for number, reader in _readers(Path(path), ids):
        start = number // GROUP_SIZE * GROUP_SIZE
        target = Path(out) / f"rows_{start}-{start + GROUP_SIZE}" / f"data_{number}.ckpt"
        target.parent.mkdir(parents=True, exist_ok=True)
        temp = target.with_suffix(f".{os.getpid()}.tmp")
        try:
            with reader:
                tensors = _specforge_tensors(reader)
            try:
                torch.save(tensors, temp)
            except RuntimeError as error:  # torch raises this instead of OSError when the disk is full
                raise OSError(f"{temp} cannot be written ({str(error)[:200]}); is the disk full?") from error
            temp.replace(target)
        finally:
            temp.unlink(missing_ok=True)
        yield target


def _readers(path: Path, ids: Sequence[str] | None) -> Iterator[tuple[int, SampleReader]]:
    if not path.is_dir():
        yield 0, SampleReader(path)
        return
    store = Store(path)
    known = {entry.id for entry in store.entries}
    if unknown := [name for name in ids or () if name not in known]:
        raise ValueError(f"{unknown[0]!r} is not a sample of {path}; its ids look like {sorted(known)[:3]}")
    for number, entry in enumerate(store.entries):
        if ids is None or entry.id in ids:
            yield number, store.reader(entry)


def _specforge_tensors(reader: SampleReader) -> dict[str, torch.Tensor]:
    whole = [(0, reader.header.num_tokens)]
    ids, mask = reader.read_small("input_ids"), reader.read_small("loss_mask")
    assert ids is not None and mask is not None
    return {
        "input_ids": ids.to(torch.int64),
        "loss_mask": mask.to(torch.int64),
        "hidden_state": reader.read_rows("hidden_state", whole)[None],
        "aux_hidden_state": reader.read_rows("aux_hidden_state", whole)[None],
    }
