"""Split the keys of few rows into pieces, and attend to all pieces in one launch.

A few hundred rows that see 100K keys make too few thread blocks to fill a GPU. Flash-Decoding splits the keys
inside its kernels. Here the kernels need no change: each piece gets copies of all rows, with key intervals
clipped to the piece. The copies of one piece follow those of the piece before, so intervals stay sorted:

    rows of piece 0 | padding | rows of piece 1 | padding | ...

(out, lse) of the copies are merged by log-sum-exp, and their dq are summed. dK and dV need no extra work, as
each (row, key) pair is in one piece only. Memory: ``pieces`` times q, out and their gradients, of few rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eagle_ds.kernels.attention import KeyBounds, merge, wide

LEAST_KEYS = 4096  # of a piece; with fewer, copying the rows takes longer than the split saves
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
        # Clip every interval to every piece, [pieces, rows]. Padded rows get an empty interval at the end
        # of the piece.
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
    # A piece needs work: with a sliding window each row sees few of all keys, so the mean number of visible
    # keys limits the pieces too.
    keys = int(bounds.hi.max() - bounds.lo.min())
    mean = int((bounds.hi - bounds.lo).mean())
    return max(min(programs // blocks, min(keys, 2 * mean) // LEAST_KEYS, MOST_PIECES), 1)
