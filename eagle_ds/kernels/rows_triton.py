"""``rows.py`` on a GPU: a program moves a piece of one row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _take_rows_kernel(Table, Index, Y, table_row, columns, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = at < columns
    source = tl.load(Index + row)
    tl.store(Y + row * columns + at, tl.load(Table + source * table_row + at, mask=real), mask=real)


@triton.jit
def _add_rows_kernel(Total, Index, X, total_row, columns, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = at < columns
    to = Total + tl.load(Index + row) * total_row + at
    x = tl.load(X + row * columns + at, mask=real, other=0.0).to(tl.float32)
    tl.store(to, tl.load(to, mask=real, other=0.0) + x, mask=real)


def take(table: Tensor, index: Tensor, columns: int) -> Tensor:
    """See ``take_rows``."""
    y = torch.empty(len(index), columns, dtype=table.dtype, device=table.device)
    if y.numel():
        _take_rows_kernel[_grid(y)](table, index.contiguous(), y, table.stride(0), columns, BLOCK)
    return y


def add(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """See ``add_rows``."""
    assert total.dtype == torch.float32 and rows.is_contiguous()
    if rows.numel():
        _add_rows_kernel[_grid(rows)](total, index.contiguous(), rows, total.stride(0), rows.shape[1], BLOCK)


def _grid(x: Tensor) -> tuple[int, int]:
    return len(x), triton.cdiv(x.shape[1], BLOCK)
