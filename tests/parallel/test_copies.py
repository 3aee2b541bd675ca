"""Copies by words are copies."""

from __future__ import annotations

import pytest
import torch

from eagle_ds.parallel.copies import copy_rows, dense, in_words


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 4, 8), (6, 4, 3), (5, 1, 4), (0, 4, 8), (7, 8)])
def test_what_is_copied_by_words_is_what_was_there(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    wide = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)
    for x in (wide[..., : shape[-1]], wide[..., 1::2], torch.randn(2, *shape).to(dtype)[1]):
        moved = x.transpose(0, 1)
        assert torch.equal(dense(moved), moved) and dense(moved).is_contiguous()
        to = torch.zeros(moved.shape, dtype=dtype)
        copy_rows(to, moved)
        assert torch.equal(to, moved)


def test_words_are_made_of_dense_numbers_at_whole_words_alone() -> None:
    x = torch.arange(48, dtype=torch.float32).view(2, 3, 8)
    assert in_words(x).shape == (2, 3, 4) and in_words(x.transpose(0, 1)).dtype == torch.int64
    for other in (x.transpose(1, 2), x[..., 1:], x[..., :3], x.double()):
        assert in_words(other) is other
