"""Few rows that see many keys: too few blocks to fill a GPU, unless each row is attended to in several pieces of its keys at once.

A kernel that takes sorted intervals needs to know nothing of this (Flash-Decoding splits keys inside its kernels): every piece has rows of
its own, copies of the rows whose keys are cut to the piece, and since pieces follow each other the intervals stay sorted. What the
copies find is merged; gradients of keys need nothing, as each pair of row and key stands in one copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eagle_ds.kernels.attention import KeyBounds, merge, wide

LEAST_KEYS = 4096  # of a piece: work enough beside the rows' copies
MOST_PIECES = 32


@dataclass(frozen=True)
class Split:
    """``pieces`` copies of some rows, each padded to whole blocks with rows that see nothing."""

    pieces: int
    rows: int
    index: Tensor  # int64 [pieces * padded rows]: the row that each copy is of
    bounds: KeyBounds  # of the copies

    @classmethod
    def make(cls, bounds: KeyBounds, pieces: int, block: int) -> Split:
        """Cut the keys that ``bounds`` see into pieces of nearly the same length; ``block`` rows are attended to at a time."""
        rows = len(bounds.lo)
        padded = -(-rows // block) * block
        edges = np.linspace(int(bounds.lo.min()), int(bounds.hi.max()), pieces + 1).astype(np.int64)
        lo, hi = (np.clip(x, edges[:-1, None], edges[1:, None]) for x in (bounds.lo, bounds.hi))  # [pieces, rows]
        empty = np.broadcast_to(edges[1:, None], (pieces, padded - rows))
        lo, hi = (np.concatenate([x, empty], axis=1).ravel() for x in (lo, hi))
        device = bounds.lo_device.device
        index = torch.arange(padded, device=device).clamp_(max=rows - 1).repeat(pieces)
        return cls(pieces, rows, index, KeyBounds.make(lo, hi, device))

    def copies(self, x: Tensor) -> Tensor:
        """[rows, ...] -> [pieces * padded, ...]."""
        return x[self.index]

    def merged(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """(out, lse) of the copies, [pieces * padded, Hq, d] and [pieces * padded, Hq], -> of the rows."""
        merged, total = merge(*zip(self._by_piece(out), self._by_piece(lse), strict=True))
        return merged.to(out.dtype), total

    def summed(self, x: Tensor) -> Tensor:
        """[pieces * padded, ...] -> [rows, ...], added up in float32 at least."""
        return self._by_piece(x).sum(0, dtype=wide(x.dtype)).to(x.dtype)

    def _by_piece(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.pieces, -1))[:, : self.rows]


def pieces_for(bounds: KeyBounds, heads: int, block: int, programs: int) -> int:
    """Into how many pieces the keys of these rows are best cut where a GPU runs ``programs`` blocks of rows at a time."""
    if not len(bounds.lo):
        return 1
    blocks = -(-len(bounds.lo) // block) * heads
    keys = int(bounds.hi.max() - bounds.lo.min())
    mean = int((bounds.hi - bounds.lo).mean())
    return max(min(programs // blocks, min(keys, 2 * mean) // LEAST_KEYS, MOST_PIECES), 1)
