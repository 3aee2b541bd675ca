"""Every attention backend computes what the plain reference computes, forward and backward, on any rows and keys."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eagle_ds.kernels.attention import AttentionBackend, KeyBounds, ReferenceAttention, merge
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

# Relative L2 error in bf16 against float64, measured on an H200 over all cases below: see docs/benchmarks/h200.md.
BF16_BOUND = 6e-3


def dense(q: Tensor, k: Tensor, v: Tensor, lo: np.ndarray, hi: np.ndarray, scale: float, diagonals: list[Tensor]) -> Tensor:
    """The joint softmax written out, for autograd."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) * scale
    column = torch.arange(len(k), device=q.device)
    seen = (column >= torch.from_numpy(lo).to(q.device)[:, None]) & (column < torch.from_numpy(hi).to(q.device)[:, None])
    parts, values = [scores.masked_fill(~seen, -math.inf)], []
    for dk, dv in zip(diagonals[::2], diagonals[1::2], strict=True):
        parts.append(torch.einsum("nhd,nhd->hn", q, dk.repeat_interleave(group, 1))[..., None] * scale)
        values.append(dv.repeat_interleave(group, 1))
    p = torch.softmax(torch.cat(parts, -1), -1)
    out = torch.einsum("hnm,mhd->nhd", p[..., : len(k)], v)
    for i, value in enumerate(values):
        out = out + p[..., len(k) + i].t()[..., None] * value
    return out


def compare(kernel: AttentionBackend, lo: np.ndarray, hi: np.ndarray, keys: int, *, heads: int = 4, kv_heads: int = 2, d: int = 16,
            count: int = 2, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, float]:  # fmt: skip
    """Relative error of out and of every gradient against the dense softmax in float64."""
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
    gradients = torch.autograd.grad(expected, leaves, dout.double())
    found = [dq, *dkv.chunk(2, -1), *d_diagonals]
    errors = {"out": relative_error(out, expected.detach())}
    return errors | {f"grad {i}": relative_error(f, g) for i, (f, g) in enumerate(zip(found, gradients, strict=True))}


def causal(n: int) -> tuple[np.ndarray, np.ndarray, int]:
    return np.zeros(n, dtype=np.int64), np.arange(1, n + 1), n


@st.composite
def monotone_bounds(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    n, keys = draw(st.integers(1, 70)), draw(st.integers(1, 90))
    lo = np.sort(rng.integers(0, keys + 1, n))
    return lo, np.maximum(np.sort(rng.integers(0, keys + 1, n)), lo), keys


@settings(max_examples=60, deadline=None, derandomize=True)
@given(monotone_bounds(), st.sampled_from([(4, 2), (4, 4), (4, 1)]), st.integers(1, 3))
def test_reference_is_the_dense_softmax(problem: tuple[np.ndarray, np.ndarray, int], heads: tuple[int, int], count: int) -> None:
    for name, error in compare(ReferenceAttention(), *problem, heads=heads[0], kv_heads=heads[1], d=4, count=count).items():
        assert error < 1e-12, name


def test_merge_with_an_empty_set_changes_nothing() -> None:
    some, nothing = (torch.randn(3, 2, 4), torch.randn(3, 2)), (torch.zeros(3, 2, 4), torch.full((3, 2), -math.inf))
    for pair in (merge(some, nothing), merge(nothing, some), merge(nothing, some, nothing)):
        assert torch.equal(pair[0], some[0]) and torch.equal(pair[1], some[1])
    both = merge(nothing, nothing)
    assert not both[0].any() and torch.isneginf(both[1]).all()


def test_causal_runs_hold_what_they_promise() -> None:
    lo = np.array([0, 0, 0, 0, 5, 5, 5, 5, 5, 9])
    hi = np.array([1, 2, 3, 7, 8, 9, 9, 9, 10, 11])
    assert KeyBounds.make(lo, hi, torch.device("cpu")).causal_runs == [(0, 3), (4, 6), (7, 9)]
    assert KeyBounds.make(lo[:0], hi[:0], torch.device("cpu")).causal_runs == []


@settings(max_examples=100, deadline=None, derandomize=True)
@given(monotone_bounds())
def test_causal_runs_are_as_long_as_they_can_be(problem: tuple[np.ndarray, np.ndarray, int]) -> None:
    lo, hi, _ = problem
    runs = KeyBounds.make(lo, hi, torch.device("cpu")).causal_runs
    inside = np.zeros(len(lo), dtype=bool)  # of the step from each row to the next
    for start, stop in runs:
        inside[start : stop - 1] = True
    for row in range(len(lo) - 1):
        both_see = (hi[row] > lo[row]) == (hi[row + 1] > lo[row + 1])
        assert inside[row] == (lo[row] == lo[row + 1] and hi[row] + 1 == hi[row + 1] and both_see)


def test_a_long_window_is_cut_at_once() -> None:
    rows = np.arange(1 << 18)
    bounds = KeyBounds.make(np.maximum(rows - 99, 0), rows + 1, torch.device("cpu"))
    started = time.process_time()
    assert Partition().groups(bounds) == [RowGroup(0, len(rows))]
    assert time.process_time() - started < 5  # looking at all rows behind each one takes a minute


def test_long_causal_runs_come_in_pieces() -> None:
    lo, hi, _ = causal(38)
    bounds, partition = KeyBounds.make(lo, hi, torch.device("cpu")), Partition(square=4, max_run=16)
    first, block = RowGroup(0, 16, (), 0), Rectangle(0, 16, 0, 16)
    assert partition.groups(bounds) == [first, RowGroup(16, 38, (block, Rectangle(16, 24, 0, 16)), 16, 2)]  # a piece of six rows would not pay
    assert partition.groups(bounds.rows(0, 37)) == [first, RowGroup(16, 36, (block, Rectangle(16, 20, 0, 16)), 16), RowGroup(36, 37)]  # padding neither


def test_shapes_are_few() -> None:
    """Whatever the lengths of prompts and answers: every new shape costs a plan."""
    squares, blocks = set(), set()
    for seed in range(200):
        random = np.random.default_rng(seed)
        turns = random.integers(1, (1 << 17) >> seed % 10, 2 << seed % 10)  # few long ones or many short ones
        ends = np.cumsum(turns)
        rows = np.concatenate([np.arange(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True)])
        bounds = KeyBounds.make(np.zeros_like(rows), rows + 1, torch.device("cpu"))
        for group in BACKWARD.for_heads(32).groups(bounds):
            squares |= {group.size + group.padding} if group.square is not None else set()
            blocks |= {(block.stop - block.start, block.last_key - block.first_key) for block in group.rectangles}
    assert len(squares) <= 24 and len(blocks) <= 130, (len(squares), len(blocks))
    assert len({rows for rows, _ in blocks}) <= 16 and len({keys for _, keys in blocks}) <= 10


def test_little_is_left_behind_full_blocks() -> None:
    """Turns of any length: of 10% of 128K tokens, less than 14% of the pairs of row and key."""
    for longest in (200, 1000, 5000):
        random = np.random.default_rng(longest)
        turns = random.integers(1, longest, 1 << 12)
        turns[::2] *= 9
        ends = np.cumsum(turns)
        rows = np.concatenate([np.arange(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True)])
        rows = rows[rows < 1 << 17]
        bounds = KeyBounds.make(np.zeros_like(rows), rows + 1, torch.device("cpu"))
        for partition in (FORWARD.for_heads(32), BACKWARD.for_heads(32)):
            left = sum((bounds.hi[p.start : p.stop] - first_uncovered_keys(bounds, p)).sum() for p in partition.groups(bounds) if p.square is None)
            assert left < 0.14 * (rows + 1).sum()


def test_the_rectangle_that_saves_most_comes_first() -> None:
    rows = np.concatenate([np.arange(20, 30), np.arange(100, 106)])
    bounds = KeyBounds.make(np.zeros_like(rows), rows + 1, torch.device("cpu"))
    (group,) = Partition(min_rows=3, launch_pairs=0, triton_ratio=2, key_multiple=8, max_keys=40).groups(bounds)
    assert group.rectangles == (
        *(Rectangle(10, 16, a, b) for a, b in ((0, 40), (40, 80), (80, 96))),  # the last six rows
        Rectangle(13, 16, 96, 104),  # behind them
        Rectangle(4, 10, 0, 24),  # and before them: nine rows and 16 keys would save as much
        Rectangle(1, 4, 0, 16),
    )
    (group,) = Partition(min_rows=3, overhead_rows=3, launch_pairs=0, triton_ratio=2, key_multiple=8, max_keys=40).groups(bounds)
    assert group.rectangles[3:] == (Rectangle(1, 10, 0, 16), Rectangle(4, 10, 16, 24))  # rows count for more where a block costs something beside them


def test_blocks_have_more_rows_where_heads_are_few() -> None:
    assert [FORWARD.for_heads(heads).min_rows for heads in (8, 32, 64)] == [2048, 512, 512]
    assert [BACKWARD.for_heads(heads).min_rows for heads in (8, 32, 64)] == [512, 512, 512], "a backward has keys to fill a GPU with"


def test_other_cuts_may_share_bounds() -> None:
    lo, hi, _ = causal(40)
    bounds = KeyBounds.make(lo, hi + 60, torch.device("cpu"))
    coarse, fine = (Partition(20, launch_pairs=0, key_multiple=10, square=square, max_keys=30).groups(bounds) for square in (100, 20))
    assert [group.square for group in coarse] == [None] and [(group.square, group.padding) for group in fine] == [(60, 0)]
    assert uncovered_bounds(bounds, coarse[0]).lo.tolist() == [60] * 20 + [80] * 20
    assert uncovered_bounds(bounds, RowGroup(0, 40)).lo.tolist() == [0] * 40


@settings(max_examples=300, deadline=None, derandomize=True)
@given(monotone_bounds(), *(st.integers(1, 4) for _ in range(3)), st.integers(0, 4), st.integers(2, 6))
def test_parts_for_cudnn_cover_the_rows_once_and_hold_what_they_promise(
    problem: tuple[np.ndarray, np.ndarray, int], rows: int, keys: int, longer: int, beside: int, square: int
) -> None:
    bounds = KeyBounds.make(*problem[:2], torch.device("cpu"))
    partition = Partition(rows, True, beside, beside, 2.0, keys, square, square << longer, keys * longer)
    parts = partition.groups(bounds)
    assert [row for group in parts for row in range(group.start, group.stop)] == list(range(len(bounds.lo)))
    for group in parts:
        check_group(group, bounds.lo[group.start : group.stop], bounds.hi[group.start : group.stop], partition)


def test_a_window_over_turns_is_cut_where_blocks_reach_beyond_a_later_row() -> None:
    """The block with the last key stands at none of the ends of the list."""
    lo, hi, _ = window_with_turns()
    partition = Partition(min_rows=4, by_heads=False, launch_pairs=0, triton_ratio=2.0, key_multiple=4, square=100, max_keys=40)
    parts = partition.groups(KeyBounds.make(lo, hi, torch.device("cpu")))
    assert len(parts) > 1
    for group in parts:
        check_group(group, lo[group.start : group.stop], hi[group.start : group.stop], partition)


def window_with_turns() -> tuple[np.ndarray, np.ndarray, int]:
    rows = np.concatenate([np.arange(10, 14), np.arange(30, 38), np.arange(52, 60)])
    return np.maximum(rows - 39, 0), rows + 1, 60


def check_group(group: RowGroup, lo: np.ndarray, hi: np.ndarray, partition: Partition) -> None:
    """Every key that a row sees is in one of its blocks, or in the square or the interval behind them, once; no interval begins
    before that of the row before."""
    seen = lo.copy()
    for start, stop, first_key, last_key in group.rectangles:
        assert (seen[start:stop] == first_key).all() and first_key < last_key <= hi[start:stop].min()
        assert 0 <= start < stop <= group.size + group.padding
        sides = (stop - start, last_key - first_key)
        if group.square is None:
            assert sides[0] in partition.sizes and sides[1] % partition.key_multiple == 0 and sides[1] <= partition.max_keys
        else:
            assert all(side % partition.square == 0 and (side // partition.square).bit_count() == 1 for side in sides)
        seen[start:stop] = last_key
    if group.square is not None:
        assert (group.size + group.padding) % partition.square == 0 and 2 * group.padding <= partition.square and (seen == group.square).all()
        assert (hi == group.square + 1 + np.arange(group.size)).all()
        return
    behind = first_uncovered_keys(KeyBounds.make(lo, hi, torch.device("cpu")), group._replace(start=0, stop=group.size))
    assert (behind == seen).all() and (np.diff(behind) >= 0).all() and (behind >= lo).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(monotone_bounds(), st.integers(1, 5), st.integers(1, 4))
def test_rows_whose_keys_are_split_find_the_same(problem: tuple[np.ndarray, np.ndarray, int], pieces: int, block: int) -> None:
    lo, hi, keys = problem
    bounds, plain = KeyBounds.make(lo, hi, torch.device("cpu")), ReferenceAttention()
    split = Split.make(bounds, pieces, block)
    assert all((np.diff(x) >= 0).all() for x in (split.bounds.lo, split.bounds.hi)) and len(split.bounds.lo) % block == 0
    q, dout = (torch.randn(len(lo), 4, 8, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(keys, 2, 8, dtype=torch.float64) for _ in range(2))
    gradients, gradients_split = ([torch.zeros_like(k), torch.zeros_like(v)] for _ in range(2))
    out, lse = plain.forward(q, k, v, bounds, 0.3)
    found, found_lse = split.merged(*plain.forward(split.copies(q), k, v, split.bounds, 0.3))
    torch.testing.assert_close((found, found_lse), (out, lse), rtol=1e-12, atol=1e-12)
    lse = lse.clamp(min=-9.0)  # as diagonal keys make it: finite in every row
    dq = plain.backward(dout, q, k, v, out, lse, bounds, 0.3, *gradients)
    copies = [split.copies(x) for x in (dout, q, out, lse)]
    dq_split = plain.backward(*copies[:2], k, v, *copies[2:], split.bounds, 0.3, *gradients_split)
    torch.testing.assert_close([split.summed(dq_split), *gradients_split], [dq, *gradients], rtol=1e-12, atol=1e-12)


def test_keys_are_split_where_rows_and_heads_fill_less_than_half_a_gpu() -> None:
    rows = np.arange(100_000, 100_300)
    bounds = KeyBounds.make(np.zeros_like(rows), rows + 1, torch.device("cpu"))
    assert [pieces_for(bounds, heads, 128, 132) for heads in (32, 8, 2)] == [1, 5, 22]
    window = KeyBounds.make(rows - 1000, rows + 1, torch.device("cpu"))
    assert pieces_for(window, 2, 128, 132) == 1


def gpu_problems() -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """Row sets that training makes: causal, trained turns, packed documents, a window, a ring block, no keys at all."""
    turns = np.concatenate([np.arange(a, a + 100) for a in (300, 700, 1500)])
    documents = np.repeat([0, 500, 513], [500, 13, 800])
    window = np.arange(1000)
    scattered = np.concatenate([np.arange(a, a + 130) for a in (100, 700, 1100, 1500)])
    block = np.clip(np.arange(1200) - 600, 0, 300)
    return {
        "causal": causal(1021),
        "late run": (np.zeros(600, dtype=np.int64), np.arange(1401, 2001), 2000),
        "turns": (np.zeros(300, dtype=np.int64), turns + 1, 1700),
        "stairs": (np.zeros(600, dtype=np.int64), np.arange(0, 3000, 5) + 1, 3000),
        "packed": (documents, np.arange(1, 1314), 1313),
        "window": (np.maximum(window - 99, 0), window + 1, 1000),
        "window with turns": (np.maximum(scattered - 899, 0), scattered + 1, 2000),
        "ring block": (np.zeros(1200, dtype=np.int64), block, 300),
        "few rows, many keys": (np.zeros(200, dtype=np.int64), np.arange(29_800, 30_000) + 1, 30_000),
        "one row": (np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64), 1),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("problem", gpu_problems(), ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(8, 2, 128), (8, 8, 64), (9, 3, 64), (16, 1, 128), (4, 2, 256)])
@pytest.mark.parametrize("backend", ["TritonBackend", "CudnnBackend"])
def test_gpu_backends_agree_with_the_dense_softmax(problem: str, heads: int, kv_heads: int, d: int, backend: str) -> None:
    from eagle_ds.kernels import attention_cudnn, attention_triton

    if backend == "CudnnBackend":
        if d > 128:
            pytest.skip("cuDNN's attention ends at d = 128 here")
        forward = Partition(64, launch_pairs=0, triton_ratio=2, key_multiple=128, square=64, max_run=512, max_keys=512)
        backward = Partition(32, overhead_rows=8, launch_pairs=0, triton_ratio=2, key_multiple=256, square=128, max_run=256, max_keys=256)
        partitions = (forward, backward)
        kernel: AttentionBackend = attention_cudnn.CudnnBackend(d, 132, *partitions)
    else:
        kernel = attention_triton.TritonBackend(d)
    lo, hi, keys = gpu_problems()[problem]
    errors = compare(kernel, lo, hi, keys, heads=heads, kv_heads=kv_heads, d=d, count=3, dtype=torch.bfloat16, device="cuda")
    for name, error in errors.items():
        assert error < BF16_BOUND, f"{name}: {error:.2e}"
