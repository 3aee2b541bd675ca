"""Tiles and chunks hold every row, and as many rows at once as their memory allows."""

from __future__ import annotations

import pytest

from eagle_ds.sharding.tiles import LOSS_CHUNK_LEAST, TILE_ROWS, TILES, loss_chunk_rows, tile_rows


@pytest.mark.parametrize("rows", [0, 1, 17, TILE_ROWS, TILE_ROWS + 1, 3 * TILE_ROWS - 5, 100 * TILE_ROWS + 1])
def test_tiles_are_even_and_few(rows: int) -> None:
    size = tile_rows(rows)
    tiles = -(-rows // size)
    assert size >= 1 and tiles <= TILES
    assert size <= TILE_ROWS or tiles == TILES
    assert rows < TILE_ROWS or tiles * size - rows < tiles


def test_a_loss_chunk_fills_its_budget_in_whole_matmul_tiles() -> None:
    """Llama-3's draft vocabulary, 7 TTT steps, bfloat16: (6 T + 12) bytes for each draft token of a row."""
    rows, row_bytes = loss_chunk_rows(32000, 7, 2, 2 << 30), 32000 * (6 * 7 + 12)
    assert rows % 256 == 0 and rows * row_bytes <= 2 << 30 < (rows + 256) * row_bytes
    assert loss_chunk_rows(1000, 4, 8, 1000 * (4 * 16 + 24) * 100) == 100
    assert loss_chunk_rows(32000, 7, 2, 1) == LOSS_CHUNK_LEAST
