"""Argmax and log-sum-exp of the target's logits do not depend on how rows and vocabulary are split."""

from __future__ import annotations

import pytest
import torch

from eagle_ds.target.head import argmax_and_logsumexp, head_logits


def test_labels_computed_row_by_row_are_those_of_the_whole_vocabulary() -> None:
    hidden, head = torch.randn(11, 8), torch.randn(29, 8)
    token, logsumexp = argmax_and_logsumexp(hidden, head, chunk_bytes=1)
    assert torch.equal(token, (hidden @ head.t()).argmax(-1))
    assert torch.allclose(logsumexp, torch.logsumexp(hidden @ head.t(), -1))


def test_labels_computed_in_blocks_of_rows_and_vocabulary_are_those_of_the_whole_logits() -> None:
    """7 positions and 11 rows of the head at a time; bfloat16 operands, products in float32."""
    hidden, head = torch.randn(23, 16).bfloat16(), torch.randn(50, 16).bfloat16()
    token, logsumexp = argmax_and_logsumexp(hidden, head, 4 * 11 * 7, vocab_rows=11)
    logits = hidden.float() @ head.float().T
    assert token.dtype == torch.int64 and torch.equal(token, logits.argmax(-1))
    assert logsumexp.dtype == torch.float32
    torch.testing.assert_close(logsumexp, torch.logsumexp(logits, -1))


@pytest.mark.parametrize("vocab_rows", [None, 11, 25])
def test_the_first_of_equal_logits_wins(vocab_rows: int | None) -> None:
    head = torch.randn(50, 4)
    head[[9, 12, 40]] = head[3] = torch.full((4,), 9.0)
    token, _ = argmax_and_logsumexp(torch.ones(2, 4), head, vocab_rows=vocab_rows)
    assert token.tolist() == [3, 3]


def test_no_positions_give_no_labels() -> None:
    token, logsumexp = argmax_and_logsumexp(
        torch.zeros(0, 4, dtype=torch.bfloat16), torch.randn(5, 4).bfloat16()
    )
    assert token.dtype == torch.int64 and logsumexp.dtype == torch.float32
    assert len(token) == len(logsumexp) == 0


def test_without_widening_a_product_on_the_cpu_is_rounded_to_the_states_type() -> None:
    hidden, head = torch.randn(9, 64).bfloat16(), torch.randn(13, 64).bfloat16()
    exact, rounded = (head_logits(hidden, head, widen=widen) for widen in (True, False))
    assert exact.dtype == rounded.dtype == torch.float32
    assert torch.equal(rounded, rounded.bfloat16().float()) and not torch.equal(exact, rounded)
    assert head_logits(hidden.double(), head).dtype == torch.float64
