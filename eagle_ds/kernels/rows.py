"""Rows picked from a table and added to one: plain PyTorch, and on a GPU one pass of a Triton kernel."""

from __future__ import annotations

from torch import Tensor

from eagle_ds.kernels.fused import is_half_on_gpu


def take_rows(table: Tensor, index: Tensor, columns: int) -> Tensor:
    """The first ``columns`` numbers of the rows ``index`` (int64 [n]) of ``table`` [M, W] -> [n, columns]."""
    if is_half_on_gpu(table):
        from eagle_ds.kernels.rows_triton import take

        return take(table, index, columns)
    return table[:, :columns][index]


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total[index[i], :columns] += rows[i] for rows [n, columns]; ``total`` float32 at least [M, W].

    Rows that share an index must be zero, as those past a document's end are: what is added at the same place at the same time
    is lost on a GPU."""
    if is_half_on_gpu(rows):
        from eagle_ds.kernels.rows_triton import add

        add(total, index, rows)
    else:
        total[:, : rows.shape[1]].index_add_(0, index, rows.to(total.dtype))
