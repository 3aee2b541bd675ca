"""Attention: every backend equals the dense softmax, forward and backward, for any interval of keys per row.

The plain reference is compared in float64, the GPU backends in bfloat16. The partition of rows for cuDNN and
the split of keys are integer arithmetic, so their properties are tested on the host.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eagle_ds.kernels.attention import KeyBounds, ReferenceAttention, merge
from eagle_ds.kernels.attention_partition import (
    BACKWARD,
    FORWARD,
    Partition,
    Rectangle,
    RowGroup,
    first_uncovered_keys,
    uncovered_bounds,
)
from eagle_ds.kernels.attention_split import Split, pieces_for
from tests.micro_batch import relative_error

# Relative L2 error in bf16 against float64. Above every error measured on an H200 over all cases below
# (docs/benchmarks/h200.md).
BF16_BOUND = 6e-3

Rows = tuple[np.ndarray, np.ndarray, int]
"""(lo, hi, number of keys): query row i sees the keys lo[i] <= j < hi[i]."""


def dense(
    q: Tensor, k: Tensor, v: Tensor, lo: np.ndarray, hi: np.ndarray, scale: float, diagonals: list[Tensor]
) -> Tensor:
    """Return the joint softmax attention from the whole score matrix, differentiable by autograd."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) * scale
    column = torch.arange(len(k), device=q.device)
    first, last = (torch.from_numpy(x).to(q.device)[:, None] for x in (lo, hi))
    visible = (column >= first) & (column < last)
    # One more column of scores for each diagonal key: row p sees its own one only.
    columns, values = [scores.masked_fill(~visible, -math.inf)], []
    for dk, dv in zip(diagonals[::2], diagonals[1::2], strict=True):
        columns.append(torch.einsum("nhd,nhd->hn", q, dk.repeat_interleave(group, 1))[..., None] * scale)
        values.append(dv.repeat_interleave(group, 1))
    p = torch.softmax(torch.cat(columns, -1), -1)
    out = torch.einsum("hnm,mhd->nhd", p[..., : len(k)], v)
    for i, value in enumerate(values):
        out = out + p[..., len(k) + i].t()[..., None] * value
    return out


def compare(
    kernel: ReferenceAttention, lo: np.ndarray, hi: np.ndarray, keys: int, *, heads: int = 4,
    kv_heads: int = 2, d: int = 16, count: int = 2, dtype: torch.dtype = torch.float64, device: str = "cpu",
) -> dict[str, float]:  # fmt: skip
    """Return the relative error of out and of every gradient against the dense softmax in float64.

    ``count`` is the number of diagonal keys of a row.
    """
    generator = torch.Generator().manual_seed(len(lo))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    q, kv, dout = random(len(lo), heads, d), random(keys, kv_heads, 2 * d), random(len(lo), heads, d)
    diagonals = [random(len(lo), kv_heads, d) for _ in range(2 * count)]
    bounds, scale = KeyBounds.make(lo, hi, torch.device(device)), d**-0.5
    k, v = kv.chunk(2, -1)
    out, lse = kernel.forward(q, k, v, bounds, scale)
    out, lse = kernel.diagonal_forward(q, out, lse, diagonals, scale)
    dkv = torch.zeros_like(kv, dtype=lse.dtype)
    dq = kernel.backward(dout, q, k, v, out, lse, bounds, scale, *dkv.chunk(2, -1))
    dq, d_diagonals = kernel.diagonal_backward(dout, q, out, lse, diagonals, scale, dq)

    leaves = [x.double().requires_grad_() for x in (q, k, v, *diagonals)]
    expected = dense(*leaves[:3], lo, hi, scale, leaves[3:])
    gradients = zip([dq, *dkv.chunk(2, -1), *d_diagonals],
                    torch.autograd.grad(expected, leaves, dout.double()), strict=True)  # fmt: skip
    errors = {"out": relative_error(out, expected.detach())}
    return errors | {f"grad {i}": relative_error(*pair) for i, pair in enumerate(gradients)}


def causal(n: int) -> Rows:
    """Return (lo, hi, number of keys) of n causal rows."""
    return np.zeros(n, dtype=np.int64), np.arange(1, n + 1), n


@st.composite
def monotone_bounds(draw: st.DrawFn) -> Rows:
    """Draw (lo, hi, number of keys) with lo and hi non-decreasing; intervals may be empty."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    n, keys = draw(st.integers(1, 70)), draw(st.integers(1, 90))
    lo = np.sort(rng.integers(0, keys + 1, n))
    return lo, np.maximum(np.sort(rng.integers(0, keys + 1, n)), lo), keys


@settings(max_examples=60, deadline=None, derandomize=True)
@given(monotone_bounds(), st.sampled_from([(4, 2), (4, 4), (4, 1)]), st.integers(1, 3))
def test_the_reference_equals_the_dense_softmax(problem: Rows, heads: tuple[int, int], count: int) -> None:
    sizes = {"heads": heads[0], "kv_heads": heads[1], "d": 4, "count": count}
    for name, error in compare(ReferenceAttention(), *problem, **sizes).items():
        assert error < 1e-12, name


def test_merge_with_an_empty_set_changes_nothing() -> None:
    some = torch.randn(3, 2, 4), torch.randn(3, 2)
    nothing = torch.zeros(3, 2, 4), torch.full((3, 2), -math.inf)
    for pair in (merge(some, nothing), merge(nothing, some), merge(nothing, some, nothing)):
        assert torch.equal(pair[0], some[0]) and torch.equal(pair[1], some[1])
    both = merge(nothing, nothing)
    assert not both[0].any() and torch.isneginf(both[1]).all()


def test_in_a_causal_run_every_row_sees_one_key_more_than_the_row_before() -> None:
    lo = np.array([0, 0, 0, 0, 5, 5, 5, 5, 5, 9])
    hi = np.array([1, 2, 3, 7, 8, 9, 9, 9, 10, 11])
    assert KeyBounds.make(lo, hi, torch.device("cpu")).causal_runs == [(0, 3), (4, 6), (7, 9)]
    assert KeyBounds.make(lo[:0], hi[:0], torch.device("cpu")).causal_runs == []


@settings(max_examples=100, deadline=None, derandomize=True)
@given(monotone_bounds())
def test_causal_runs_are_maximal(problem: Rows) -> None:
    lo, hi, _ = problem
    runs = KeyBounds.make(lo, hi, torch.device("cpu")).causal_runs
    inside = np.zeros(len(lo), dtype=bool)  # whether row i and row i + 1 are in the same run
    for start, stop in runs:
        inside[start : stop - 1] = True
    for row in range(len(lo) - 1):
        both_see = (hi[row] > lo[row]) == (hi[row + 1] > lo[row + 1])
        assert inside[row] == (lo[row] == lo[row + 1] and hi[row] + 1 == hi[row + 1] and both_see)


def test_a_long_window_is_partitioned_in_linear_time() -> None:
    rows = np.arange(1 << 18)
    bounds = KeyBounds.make(np.maximum(rows - 99, 0), rows + 1, torch.device("cpu"))
    started = time.process_time()
    assert Partition().groups(bounds) == [RowGroup(0, len(rows))]
    assert time.process_time() - started < 5  # comparing every row with all later ones takes a minute


def test_long_causal_runs_are_divided() -> None:
    lo, hi, _ = causal(38)
    bounds, partition = KeyBounds.make(lo, hi, torch.device("cpu")), Partition(square=4, max_run=16)
    first, rectangle = RowGroup(0, 16, (), 0), Rectangle(0, 16, 0, 16)
    # All other rows make one group: a third one of only six rows would cost more than it saves.
    last = RowGroup(16, 38, (rectangle, Rectangle(16, 24, 0, 16)), 16, 2)
    assert partition.groups(bounds) == [first, last]
    # Padding one row to a square of four would cost more than it saves, so that row goes to Triton.
    last = RowGroup(16, 36, (rectangle, Rectangle(16, 20, 0, 16)), 16)
    assert partition.groups(bounds.rows(0, 37)) == [first, last, RowGroup(36, 37)]


def trained_rows(turns: np.ndarray) -> np.ndarray:
    """Return the rows of every second turn, from the turns' lengths: the answers, without the prompts."""
    ends = np.cumsum(turns)
    return np.concatenate([np.arange(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True)])


def test_few_shapes_serve_all_lengths_of_turns() -> None:
    """cuDNN builds an execution plan for every new shape, so their number must be bounded."""
    squares, rectangles = set(), set()
    for seed in range(200):
        random = np.random.default_rng(seed)
        # A few long turns, or many short ones.
        rows = trained_rows(random.integers(1, (1 << 17) >> seed % 10, 2 << seed % 10))
        bounds = KeyBounds.make(np.zeros_like(rows), rows + 1, torch.device("cpu"))
        for group in BACKWARD.for_heads(32).groups(bounds):
            squares |= {group.size + group.padding} if group.square is not None else set()
            rectangles |= {(r.stop - r.start, r.last_key - r.first_key) for r in group.rectangles}
    assert len(squares) <= 24 and len(rectangles) <= 130, (len(squares), len(rectangles))
    assert len({rows for rows, _ in rectangles}) <= 16 and len({keys for _, keys in rectangles}) <= 10


def test_few_pairs_are_left_to_triton() -> None:
    """With 10% of 128K rows trained, at most 14% of the (row, key) pairs are outside of all rectangles."""
    for longest in (200, 1000, 5000):
        random = np.random.default_rng(longest)
        turns = random.integers(1, longest, 1 << 12)
        turns[::2] *= 9
        rows = trained_rows(turns)
        rows = rows[rows < 1 << 17]
        bounds = KeyBounds.make(np.zeros_like(rows), rows + 1, torch.device("cpu"))
        for partition in (FORWARD.for_heads(32), BACKWARD.for_heads(32)):
            left = 0
            for group in partition.groups(bounds):
                if group.square is None:
                    hi = bounds.hi[group.start : group.stop]
                    left += (hi - first_uncovered_keys(bounds, group)).sum()
            assert left < 0.14 * (rows + 1).sum()


def test_the_rectangle_that_saves_most_comes_first() -> None:
    rows = np.concatenate([np.arange(20, 30), np.arange(100, 106)])
    bounds = KeyBounds.make(np.zeros_like(rows), rows + 1, torch.device("cpu"))
    partition = Partition(min_rows=3, launch_pairs=0, triton_ratio=2, key_multiple=8, max_keys=40)
    (group,) = partition.groups(bounds)
    assert group.rectangles == (
        # First the last six rows, divided by max_keys.
        *(Rectangle(10, 16, a, b) for a, b in ((0, 40), (40, 80), (80, 96))),
        Rectangle(13, 16, 96, 104),  # then the same rows, beyond those keys
        Rectangle(4, 10, 0, 24),  # then the rows before: nine rows and 16 keys would save as much
        Rectangle(1, 4, 0, 16),
    )
    # With a cost for each rectangle apart from its rows, fewer rectangles of more rows save more.
    (group,) = replace(partition, overhead_rows=3).groups(bounds)
    assert group.rectangles[3:] == (Rectangle(1, 10, 0, 16), Rectangle(4, 10, 16, 24))


def test_rectangles_have_more_rows_if_there_are_few_heads() -> None:
    assert [FORWARD.for_heads(heads).min_rows for heads in (8, 32, 64)] == [2048, 512, 512]
    # In a backward the keys of a rectangle fill the GPU too.
    assert [BACKWARD.for_heads(heads).min_rows for heads in (8, 32, 64)] == [512, 512, 512]


def test_two_partitions_can_share_bounds() -> None:
    lo, hi, _ = causal(40)
    bounds = KeyBounds.make(lo, hi + 60, torch.device("cpu"))
    partition = Partition(20, launch_pairs=0, key_multiple=10, square=100, max_keys=30)
    coarse, fine = partition.groups(bounds), replace(partition, square=20).groups(bounds)
    assert [group.square for group in coarse] == [None]
    assert [(group.square, group.padding) for group in fine] == [(60, 0)]
    assert uncovered_bounds(bounds, coarse[0]).lo.tolist() == [60] * 20 + [80] * 20
    assert uncovered_bounds(bounds, RowGroup(0, 40)).lo.tolist() == [0] * 40


@settings(max_examples=300, deadline=None, derandomize=True)
@given(monotone_bounds(), *(st.integers(1, 4) for _ in range(3)), st.integers(0, 4), st.integers(2, 6))
def test_groups_cover_every_row_and_every_visible_key_once(
    problem: Rows, rows: int, keys: int, longer: int, overhead: int, square: int
) -> None:
    bounds = KeyBounds.make(*problem[:2], torch.device("cpu"))
    partition = Partition(rows, True, overhead, overhead, 2.0, keys, square, square << longer, keys * longer)
    check_groups(bounds, partition)


def test_a_window_over_turns_is_divided_where_a_rectangle_ends_after_a_later_first_key() -> None:
    """The rectangle with the greatest last key is neither the first nor the last in its list."""
    rows = np.concatenate([np.arange(10, 14), np.arange(30, 38), np.arange(52, 60)])
    bounds = KeyBounds.make(np.maximum(rows - 39, 0), rows + 1, torch.device("cpu"))
    partition = Partition(4, False, 0, 0, 2.0, key_multiple=4, square=100, max_keys=40)
    assert len(check_groups(bounds, partition)) > 1


def check_groups(bounds: KeyBounds, partition: Partition) -> list[RowGroup]:
    """Check that the groups hold every row once, and check each of them; return them."""
    groups = partition.groups(bounds)
    assert [row for group in groups for row in range(group.start, group.stop)] == list(range(len(bounds.lo)))
    for group in groups:
        own = bounds.rows(group.start, group.stop)
        check_group(group, own.lo, own.hi, partition)
    return groups


def check_group(group: RowGroup, lo: np.ndarray, hi: np.ndarray, partition: Partition) -> None:
    """Check that each row's keys are covered once: by rectangles, then by the square or an interval.

    The first key of that interval must not decrease from row to row.
    """
    covered = lo.copy()  # the first key of each row that is not covered yet
    for start, stop, first_key, last_key in group.rectangles:
        assert (covered[start:stop] == first_key).all() and first_key < last_key <= hi[start:stop].min()
        assert 0 <= start < stop <= group.size + group.padding
        rows, keys = sides = (stop - start, last_key - first_key)
        if group.square is None:
            assert rows in partition.sizes
            assert keys % partition.key_multiple == 0 and keys <= partition.max_keys
        else:
            multiples = [side // partition.square for side in sides]
            assert all(side % partition.square == 0 for side in sides)
            assert all(multiple.bit_count() == 1 for multiple in multiples)
        covered[start:stop] = last_key
    if group.square is not None:
        assert (group.size + group.padding) % partition.square == 0 and (covered == group.square).all()
        assert 2 * group.padding <= partition.square
        assert (hi == group.square + 1 + np.arange(group.size)).all()
        return
    bounds = KeyBounds.make(lo, hi, torch.device("cpu"))
    uncovered = first_uncovered_keys(bounds, group._replace(start=0, stop=group.size))
    assert (uncovered == covered).all() and (np.diff(uncovered) >= 0).all() and (uncovered >= lo).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(monotone_bounds(), st.integers(1, 5), st.integers(1, 4))
def test_splitting_keys_changes_no_result(problem: Rows, pieces: int, block: int) -> None:
    lo, hi, keys = problem
    bounds, plain = KeyBounds.make(lo, hi, torch.device("cpu")), ReferenceAttention()
    split = Split.make(bounds, pieces, block)
    assert all((np.diff(x) >= 0).all() for x in (split.bounds.lo, split.bounds.hi))
    assert len(split.bounds.lo) % block == 0
    q, dout = (torch.randn(len(lo), 4, 8, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(keys, 2, 8, dtype=torch.float64) for _ in range(2))
    gradients, gradients_split = ([torch.zeros_like(k), torch.zeros_like(v)] for _ in range(2))
    out, lse = plain.forward(q, k, v, bounds, 0.3)
    found = split.merged(*plain.forward(split.copies(q), k, v, split.bounds, 0.3))
    torch.testing.assert_close(found, (out, lse), rtol=1e-12, atol=1e-12)
    lse = lse.clamp(min=-9.0)  # finite in every row, as it is after the merge with diagonal keys
    dq = plain.backward(dout, q, k, v, out, lse, bounds, 0.3, *gradients)
    copies = [split.copies(x) for x in (dout, q, out, lse)]
    dq_split = plain.backward(*copies[:2], k, v, *copies[2:], split.bounds, 0.3, *gradients_split)
    found = [split.summed(dq_split), *gradients_split]
    torch.testing.assert_close(found, [dq, *gradients], rtol=1e-12, atol=1e-12)


def test_keys_are_split_if_rows_and_heads_fill_less_than_half_a_gpu() -> None:
    rows = np.arange(100_000, 100_300)
    bounds = KeyBounds.make(np.zeros_like(rows), rows + 1, torch.device("cpu"))
    assert [pieces_for(bounds, heads, 128, 132) for heads in (32, 8, 2)] == [1, 5, 22]
    window = KeyBounds.make(rows - 1000, rows + 1, torch.device("cpu"))
    assert pieces_for(window, 2, 128, 132) == 1


def gpu_problems() -> dict[str, Rows]:
    """Return the kinds of rows in training: causal, trained turns, packed documents, a window, a ring block.

    In the ring block the first 600 rows see no key at all.
    """
    turns = np.concatenate([np.arange(a, a + 100) for a in (300, 700, 1500)])
    documents = np.repeat([0, 500, 513], [500, 13, 800])
    window = np.arange(1000)
    scattered = np.concatenate([np.arange(a, a + 130) for a in (100, 700, 1100, 1500)])
    arrived = np.clip(np.arange(1200) - 600, 0, 300)
    return {
        "causal": causal(1021),
        "late run": (np.zeros(600, dtype=np.int64), np.arange(1401, 2001), 2000),
        "turns": (np.zeros(300, dtype=np.int64), turns + 1, 1700),
        "stairs": (np.zeros(600, dtype=np.int64), np.arange(0, 3000, 5) + 1, 3000),
        "packed": (documents, np.arange(1, 1314), 1313),
        "window": (np.maximum(window - 99, 0), window + 1, 1000),
        "window with turns": (np.maximum(scattered - 899, 0), scattered + 1, 2000),
        "ring block": (np.zeros(1200, dtype=np.int64), arrived, 300),
        "few rows, many keys": (np.zeros(200, dtype=np.int64), np.arange(29_800, 30_000) + 1, 30_000),
        "one row": (np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64), 1),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("problem", gpu_problems(), ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d"), [(8, 2, 128), (8, 8, 64), (9, 3, 64), (16, 1, 128), (4, 2, 256)]
)
@pytest.mark.parametrize("backend", ["TritonBackend", "CudnnBackend"])
def test_gpu_backends_equal_the_dense_softmax(
    problem: str, heads: int, kv_heads: int, d: int, backend: str
) -> None:
    from eagle_ds.kernels import attention_cudnn, attention_triton

    if backend == "CudnnBackend":
        if d > 128:
            pytest.skip("cuDNN's attention supports d <= 128 only")
        forward = Partition(
            64, launch_pairs=0, triton_ratio=2, key_multiple=128, square=64, max_run=512, max_keys=512
        )
        backward = replace(
            forward, min_rows=32, overhead_rows=8, key_multiple=256, square=128, max_run=256, max_keys=256
        )
        kernel: ReferenceAttention = attention_cudnn.CudnnBackend(d, 132, forward, backward)
    else:
        kernel = attention_triton.TritonBackend(d)
    sizes = {"heads": heads, "kv_heads": kv_heads, "d": d, "count": 3}
    errors = compare(kernel, *gpu_problems()[problem], **sizes, dtype=torch.bfloat16, device="cuda")
    for name, error in errors.items():
        assert error < BF16_BOUND, f"{name}: {error:.2e}"
