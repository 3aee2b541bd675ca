"""How many rows a rank works on at once where it does not take all its rows together. Integers only.

The model and the memory estimate both read these, so an estimate cannot differ from what a step does.
"""

from __future__ import annotations

TILE_ROWS = 8192  # rows of one recomputed tile: enough to fill a GPU; 0.9 GB of an 8B draft's MLP
TILES = 8  # at most this many tiles; more would add sums of weight gradients and save no memory
# Memory of one chunk of the loss: matmuls on a GPU need many rows, a CPU's caches hold few.
LOSS_CHUNK_BYTES = {"cuda": 2 << 30, "cpu": 1 << 28}
LOSS_CHUNK_LEAST = 16  # rows that a chunk has at least, even if they exceed its budget
MATMUL_TILE = 256  # rows; a whole number of tiles leaves no matrix unit idle


def tile_rows(rows: int) -> int:
    """Split ``rows`` evenly into ceil(rows / TILE_ROWS) tiles, at most TILES, and return the rows of a tile.

    Recomputation runs tile by tile.
    """
    return -(-rows // min(max(-(-rows // TILE_ROWS), 1), TILES)) or 1


def loss_chunk_rows(vocab: int, ttt_steps: int, element_bytes: int, budget_bytes: int) -> int:
    """Return how many query rows the loss takes at once, C, so that their logits fit in ``budget_bytes``.

    A query row brings T rows of draft logits in float32 and T rows of their gradient in the weight's type
    (``element_bytes``). It also brings about one row of target logits: float32, and two more such rows for
    what is computed from them. Each row has ``vocab`` numbers.
    """
    wide = max(element_bytes, 4)  # float32 at least
    rows = budget_bytes // (vocab * (ttt_steps * (element_bytes + wide) + 3 * wide))
    rows = max(rows, LOSS_CHUNK_LEAST)
    return rows // MATMUL_TILE * MATMUL_TILE or rows
