"""Split the keys of few rows into pieces that are attended to at the same time.

A few hundred rows that see 100K keys make too few thread blocks to fill a GPU. (Flash-Decoding splits keys
inside its kernels.) Here the kernel needs no change: each piece has copies of all rows, whose key intervals
are cut to the piece. Pieces follow each other, so intervals stay sorted from row to row:

    rows of piece 0 | padding | rows of piece 1 | padding | ...

The copies' (out, lse) are merged by log-sum-exp, and their dq summed. dK and dV need nothing: each pair of
row and key is in one piece only. Memory: ``pieces`` times q, out and their gradients, for a few hundred rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eagle_ds.kernels.attention import KeyBounds, merge, wide

LEAST_KEYS = 4096  # of a piece; with fewer, copying rows costs too much
MOST_PIECES = 32


@dataclass(frozen=True)
class Split:
    """Copies of some rows, one set for each piece, each padded to whole blocks with rows that see no key."""

    pieces: int
    rows: int
    index: Tensor  # int64 [pieces * padded rows]: source row of each copy
    bounds: KeyBounds  # of the copies

    @classmethod
    def make(cls, bounds: KeyBounds, pieces: int, block: int) -> Split:
        """Divide the keys of all rows into ``pieces`` equal ranges; pad rows to a multiple of ``block``."""
        rows = len(bounds.lo)
        padded = -(-rows // block) * block
        edges = np.linspace(int(bounds.lo.min()), int(bounds.hi.max()), pieces + 1).astype(np.int64)
        # Clip every interval to every piece, [pieces, rows]; padding sees the empty interval at the piece's
        # end.
        lo, hi = (np.clip(x, edges[:-1, None], edges[1:, None]) for x in (bounds.lo, bounds.hi))
        empty = np.broadcast_to(edges[1:, None], (pieces, padded - rows))
        lo, hi = (np.concatenate([x, empty], axis=1).ravel() for x in (lo, hi))
        device = bounds.lo_device.device
        index = torch.arange(padded, device=device).clamp_(max=rows - 1).repeat(pieces)
        return cls(pieces, rows, index, KeyBounds.make(lo, hi, device))

    def copies(self, x: Tensor) -> Tensor:
        """Copy rows for every piece: [rows, ...] -> [pieces * padded, ...]."""
        return x[self.index]

    def merged(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Merge (out, lse) of the copies, [pieces * padded, Hq, d] and [pieces * padded, Hq], by row."""
        merged, total = merge(*zip(self._by_piece(out), self._by_piece(lse), strict=True))
        return merged.to(out.dtype), total

    def summed(self, x: Tensor) -> Tensor:
        """Sum over pieces, in float32 at least: [pieces * padded, ...] -> [rows, ...]."""
        return self._by_piece(x).sum(0, dtype=wide(x.dtype)).to(x.dtype)

    def _by_piece(self, x: Tensor) -> Tensor:
        """View as [pieces, rows, ...], without padding."""
        return x.unflatten(0, (self.pieces, -1))[:, : self.rows]


def pieces_for(bounds: KeyBounds, heads: int, block: int, programs: int) -> int:
    """Return the number of pieces for these rows on a GPU with ``programs`` multiprocessors."""
    if not len(bounds.lo):
        return 1
    blocks = -(-len(bounds.lo) // block) * heads
    # Pieces without work are useless: a window's rows see far fewer keys than lie between its first and last.
    keys = int(bounds.hi.max() - bounds.lo.min())
    mean = int((bounds.hi - bounds.lo).mean())
    return max(min(programs // blocks, min(keys, 2 * mean) // LEAST_KEYS, MOST_PIECES), 1)
