"""Strided copies of half-precision numbers, four at a time.

PyTorch copies what is not dense a number at a time; with 2 bytes each that is 1 TB/s on an H200, in words 2 (docs/benchmarks/h200.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BYTES = 8


def in_words(x: Tensor) -> Tensor:
    """``x`` as int64, its last dimension so much shorter, where that dimension lies dense and the others at whole words; else ``x``.
    Shares memory with ``x``; no autograd."""
    ratio = WORD_BYTES // x.element_size()
    whole = x.dim() > 0 and not any(n % ratio for n in (x.shape[-1], x.storage_offset(), *x.stride()[:-1]))
    return x.detach().view(torch.int64) if ratio > 1 and whole and x.stride(-1) == 1 else x


def dense(x: Tensor) -> Tensor:
    """``x.contiguous()``; no autograd."""
    return in_words(x).contiguous().view(x.dtype)


def copy_rows(to: Tensor, rows: Tensor) -> None:
    """``to.copy_(rows)`` of the same shape and type; no autograd."""
    words = in_words(to), in_words(rows)
    if words[0].dtype == words[1].dtype:
        words[0].copy_(words[1])
    else:
        to.copy_(rows)
