"""Run the Triton kernels on a CPU in Triton's interpreter, compare them with the plain ones, print JSON.

``test_interpreted`` runs this as a process of its own, because TRITON_INTERPRET must be set before a kernel
is defined. The output is {check: {quantity: relative error}}, or {check: traceback} for a check that failed.

Inputs are float16, because NumPy, which the interpreter computes with, has no bfloat16. Tiles are as small as
the kernels allow, so that small inputs have many tiles and masked edges everywhere.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Sequence
from functools import partial

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.errors import OutOfResources

from eagle_ds.kernels import (
    attention_cudnn,
    attention_split,
    diagonal_triton,
    elementwise_triton,
    loss_triton,
    norm_triton,
    sums_triton,
)
from eagle_ds.kernels.attention import KeyBounds, ReferenceAttention, merge
from eagle_ds.kernels.attention_cudnn import CudnnBackend
from eagle_ds.kernels.attention_partition import Partition
from eagle_ds.kernels.attention_triton import TILES, TritonBackend
from eagle_ds.kernels.backend import PlainOperations
from eagle_ds.kernels.loss import PlainKernels
from eagle_ds.kernels.loss_triton import TritonKernels
from tests.micro_batch import relative_error

CPU, HEADS, KV_HEADS, WIDTH = torch.device("cpu"), 4, 2, 16
SCALE = WIDTH**-0.5
Errors = dict[str, float]


def row_sets() -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """Return (lo, hi, number of keys) of the kinds of rows in training; none fills whole tiles."""
    rows = np.sort(np.random.default_rng(0).choice(90, 37, replace=False))
    documents = np.array([0, 37, 41])
    block = np.clip(np.arange(37) - 9, 0, 20)
    return {
        "causal": (np.zeros(41, dtype=np.int64), np.arange(1, 42), 41),
        "scattered": (np.zeros(37, dtype=np.int64), rows + 1, 90),
        "packed": (documents[np.searchsorted(documents, rows, side="right") - 1], rows + 1, 90),
        "window": (np.maximum(rows - 20, 0), rows + 1, 90),
        "window with turns": window_with_turns(),
        "ring block": (np.zeros(37, dtype=np.int64), block, 20),
        "keys that no row sees": (np.full(3, 40), np.full(3, 60), 90),
        "one row": (np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64), 1),
    }


def window_with_turns() -> tuple[np.ndarray, np.ndarray, int]:
    """Return a window where a rectangle of earlier rows ends after a later row's first key."""
    rows = np.concatenate([np.arange(10, 14), np.arange(30, 38), np.arange(52, 60)])
    return np.maximum(rows - 39, 0), rows + 1, 60


def attention(
    lo: np.ndarray, hi: np.ndarray, keys: int, heads_first: bool = False, in_groups: bool = False
) -> Errors:
    """Compare out, lse and every gradient, with two diagonals.

    ``heads_first``: give the backward an ``out`` with cuDNN's memory layout. ``in_groups``: partition the
    rows as for cuDNN, with the reference in the place of cuDNN.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).half()

    q, kv = random(len(lo), HEADS, WIDTH), random(keys, KV_HEADS, 2 * WIDTH)
    dout = random(len(lo), HEADS, WIDTH)
    diagonals, bounds = [random(len(lo), KV_HEADS, WIDTH) for _ in range(4)], KeyBounds.make(lo, hi, CPU)

    def run(kernel: ReferenceAttention, dtype: torch.dtype) -> list[Tensor]:
        q_, kv_, dout_, *diagonals_ = (x.to(dtype) for x in (q, kv, dout, *diagonals))
        prefix, prefix_lse = kernel.forward(q_, *kv_.chunk(2, -1), bounds, SCALE)
        out, lse = kernel.diagonal_forward(q_, prefix, prefix_lse, diagonals_, SCALE)
        if heads_first:
            out = out.transpose(0, 1).contiguous().transpose(0, 1)
        dkv = torch.zeros_like(kv_, dtype=lse.dtype)
        dq = kernel.backward(dout_, q_, *kv_.chunk(2, -1), out, lse, bounds, SCALE, *dkv.chunk(2, -1))
        dq, gradients = kernel.diagonal_backward(dout_, q_, out, lse, diagonals_, SCALE, dq)
        return [prefix, prefix_lse.exp(), out, lse, dq, dkv, *gradients]

    names = ("prefix", "prefix lse", "out", "lse", "dq", "dkv", "dk1", "dv1", "dk2", "dv2")
    found = run(backend_with_groups() if in_groups else backend(), torch.float16)
    return errors(names, found, run(ReferenceAttention(), torch.float64))


def errors(names: Sequence[str], found: list[Tensor], expected: list[Tensor]) -> Errors:
    """Return the relative error of each quantity."""
    pairs = zip(names, found, expected, strict=True)
    return {name: relative_error(f, e.to(torch.float64)) for name, f, e in pairs}


def split_keys(lo: np.ndarray, hi: np.ndarray, keys: int) -> Errors:
    """Compare few rows on a large GPU, whose keys are split into pieces."""
    generator = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(len(lo), HEADS, WIDTH, generator=generator).half() for _ in range(2))
    kv = torch.randn(keys, KV_HEADS, 2 * WIDTH, generator=generator).half()
    kernel, plain, bounds = TritonBackend(WIDTH, 1), ReferenceAttention(), KeyBounds.make(lo, hi, CPU)
    set_tiles(kernel, programs=48)
    assert kernel._split(bounds, HEADS) is not None
    found, expected = [], []
    for made, backend, dtype in ((found, kernel, torch.float16), (expected, plain, torch.float64)):
        q_, kv_, dout_ = (x.to(dtype) for x in (q, kv, dout))
        out, lse = backend.forward(q_, *kv_.chunk(2, -1), bounds, SCALE)
        dkv = torch.zeros_like(kv_, dtype=lse.dtype)
        dq = backend.backward(dout_, q_, *kv_.chunk(2, -1), out, lse, bounds, SCALE, *dkv.chunk(2, -1))
        made += [out, lse, dq, dkv]
    return errors(("out", "lse", "dq", "dkv"), found, expected)


def smaller_tiles() -> Errors:
    """Check that tiles too large for a GPU are dropped for good, and that none left is an error."""
    kernel, tried = TritonBackend(WIDTH, 1), []

    def launch(*tile: int) -> None:
        tried.append(tile)
        if tile[1] > 32:
            raise OutOfResources(230400, 101376, "shared memory")

    for _ in range(2):
        kernel._launch("forward", launch)
    wrong = tried != [*TILES["forward"], TILES["forward"][-1]]
    try:
        kernel._launch("dq", lambda *tile: launch(64, 64))
    except OutOfResources:
        return {"order": float(wrong)}
    return {"order": 1.0}


def losses(kind: str) -> Errors:
    """Compare label sums, row losses and gradients, over several blocks of columns and a short last one."""
    generator = torch.Generator().manual_seed(0)
    logits, target = (3 * torch.randn(n, 200, generator=generator) for n in (5, 3))
    row = torch.tensor([0, 0, 1, 2, 2])
    weight, mix = (torch.rand(5, generator=generator) for _ in range(2))

    def run(kernels: type[PlainKernels], dtype: torch.dtype) -> list[Tensor]:
        t, gradient = target.to(dtype), torch.empty(5, 200, dtype=dtype)
        lse, entropy = kernels.label_sums(t)
        mixed = mix.to(dtype) if kind == "lambda" else None
        arguments = (logits.to(dtype), t, row, lse, lse + 0.1, kind, mixed)
        silent = kernels.row_losses(*arguments, weight.to(dtype), None)
        return [lse, entropy, *silent, *kernels.row_losses(*arguments, weight.to(dtype), gradient), gradient]

    row_names = ("cross-entropy", "alpha", "best")
    nan, zeros = torch.full((1, 200), torch.nan), torch.zeros(3)
    cross_entropy, _, best = TritonKernels.row_losses(
        nan, target, row[:1], zeros, zeros, kind, None, weight[:1], None
    )
    assert cross_entropy.isnan() and 0 <= best < 200, "the argmax of NaN must be a valid column"
    names = ("lse", "entropy", *(f"{name}, no gradient" for name in row_names), *row_names, "gradient")
    return errors(names, run(TritonKernels, torch.float32), run(PlainKernels, torch.float64))


def allow_new_numpy() -> None:
    """Let arrays of one number be bounds of loops.

    Triton 3.6 converts them to integers in a way that NumPy 2.4 no longer supports (Triton issue 9171).
    """
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: type, *rest: object) -> None:
        patch(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend


def backend() -> TritonBackend:
    """Return the Triton backend with small tiles."""
    made = TritonBackend(WIDTH)
    set_tiles(made)
    assert made.diagonal_forward is diagonal_triton.diagonal_forward
    return made


def backend_with_groups() -> CudnnBackend:
    """Return a backend that makes every kind of group at this size, with the reference in cuDNN's place."""
    common = {"by_heads": False, "launch_pairs": 0}
    forward_sizes = {"key_multiple": 4, "square": 4, "max_run": 8, "max_keys": 16}
    backward_sizes = {"key_multiple": 8, "square": 6, "max_run": 12, "max_keys": 8}
    partitions = (
        Partition(min_rows=4, triton_ratio=2, **common, **forward_sizes),
        Partition(min_rows=6, overhead_rows=1, **common, **backward_sizes),
    )
    made, plain = CudnnBackend(WIDTH, 1, *partitions), ReferenceAttention()
    set_tiles(made)

    def bounds(q: Tensor, k: Tensor, causal: bool) -> KeyBounds:
        hi = np.arange(1, len(q) + 1) if causal else np.full(len(q), len(k))
        return KeyBounds.make(np.zeros(len(q), dtype=np.int64), hi, CPU)

    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = plain.forward(q, k, v, bounds(q, k, causal), scale)
        return out, lse.t().contiguous().t()  # cuDNN's memory layout

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dk, dv = (torch.zeros(k.shape) for _ in range(2))
        dq = plain.backward(dout, q, k, v, out, lse, bounds(q, k, causal), scale, dk, dv)
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    attention_cudnn._cudnn_forward, attention_cudnn._cudnn_backward = forward, backward
    return made


def sums() -> Errors:
    """Compare ``merge_into`` and ``add_into`` on strided tensors; some rows see no key."""
    generator = torch.Generator().manual_seed(0)
    outs = [torch.randn(37, HEADS, WIDTH, generator=generator).half() for _ in range(2)]
    lses = [torch.randn(HEADS, 37, generator=generator).t() for _ in range(2)]
    lses[0][:5], lses[1][3:9] = -torch.inf, -torch.inf
    out, lse = merge(*((o.double(), s.double()) for o, s in zip(outs, lses, strict=True)))
    sums_triton.merge_into(outs[0], lses[0], outs[1].transpose(0, 1).contiguous().transpose(0, 1), lses[1])
    total = torch.randn(37, KV_HEADS, 2 * WIDTH, generator=generator)
    blocks = [torch.randn(KV_HEADS, 37, WIDTH, generator=generator).half().transpose(0, 1) for _ in range(2)]
    expected = total.double() + torch.cat(blocks, -1).double()
    sums_triton.add_into(*total.chunk(2, -1), *blocks)
    pairs = {"out": (outs[0], out), "lse": (lses[0].exp(), lse.exp()), "total": (total, expected)}
    return {name: relative_error(*pair) for name, pair in pairs.items()}


def norms() -> Errors:
    """Compare norms of columns of wider tensors and of rows of a table, with more rows than programs."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(37, 24, generator=generator).half() for _ in range(2))
    weight = torch.randn(12, generator=generator).half()
    rows = torch.randint(37, (37, 2), generator=generator)[:, 0]  # strided
    norm_triton.PROGRAMS = 5
    measured = {}
    for name, ids in (("rows", None), ("table", rows)):
        leaves = [t.double().requires_grad_() for t in (x[:, 12:], weight)]
        source = leaves[0] if ids is None else leaves[0][ids]
        expected = torch.nn.functional.rms_norm(source, (12,), leaves[1], 1e-5)
        y = norm_triton.norm_forward(x[:, 12:], ids, weight, 1e-5, torch.empty(37, 24).half()[:, :12])
        place = torch.empty(50, 12).half()[13:] if ids is None else None
        wants_dx = ids is None
        dx, dw = norm_triton.norm_backward(
            dy[:, 12:], x[:, 12:], ids, weight, 1e-5, wants_dx=wants_dx, dx=place
        )
        assert dx is place
        expected_dx, expected_dw = torch.autograd.grad(expected, leaves, dy[:, 12:].double())
        measured[f"{name}, y"] = relative_error(y, expected.detach())
        measured[f"{name}, dw"] = relative_error(dw, expected_dw)
        measured |= {"dx": relative_error(dx, expected_dx)} if dx is not None else {}
    return measured


def rows() -> Errors:
    """Compare taking and adding some columns of rows in any order, over several blocks of columns."""
    generator = torch.Generator().manual_seed(0)
    table, total = torch.randn(37, 50, generator=generator).half(), torch.randn(37, 50, generator=generator)
    x, index = torch.randn(11, 40, generator=generator).half(), torch.randperm(37, generator=generator)[:11]
    elementwise_triton.ROW_BLOCK = 16
    expected = total.double()
    expected[index, :40] += x.double()
    taken = elementwise_triton.take_rows(table, index, 40)
    elementwise_triton.add_rows(total, index, x)
    return {"taken": relative_error(taken, table[index, :40]), "total": relative_error(total, expected)}


def rotations() -> Errors:
    """Compare the rotation and its inverse on columns of wider rows."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(7, 3 * WIDTH + 5, generator=generator).half()
    angles = torch.randn(7, 1, WIDTH // 2, generator=generator)
    x, y = (t[:, : 3 * WIDTH].unflatten(-1, (3, WIDTH)) for t in (raw, torch.zeros_like(raw)))
    cos, sin = angles.cos(), angles.sin()
    elementwise_triton.rotate_into(y, x, cos, sin)
    expected = PlainOperations.rope(x.double(), cos.double(), sin.double())
    back = torch.empty(x.shape, dtype=x.dtype)
    elementwise_triton.rotate_into(back, y, cos, sin, back=True)
    return {"there": relative_error(y, expected), "back": relative_error(back, x)}


def set_tiles(kernel: TritonBackend, programs: int = 1) -> None:
    kernel.programs = programs
    kernel.tiles = {name: [(16, 32, 4, 1)] for name in kernel.tiles}


def checks() -> dict[str, Callable[[], Errors]]:
    """Return all checks by name. test_interpreted.py lists the quantities of each."""
    sets = row_sets()
    attention_split.LEAST_KEYS, loss_triton.BLOCK = 4, 64
    made: dict[str, Callable[[], Errors]] = {"smaller tiles": smaller_tiles, "sums": sums, "norms": norms}
    made |= {"rows": rows, "rotation": rotations}
    for name in sets:
        made[f"attention, {name}"] = partial(attention, *sets[name])
    for name in list(sets)[:6]:
        made[f"attention in groups, {name}"] = partial(attention, *sets[name], in_groups=True)
    made["attention, heads first in memory"] = partial(attention, *sets["causal"], heads_first=True)
    for name in ("scattered", "packed"):
        made[f"keys split, {name}"] = partial(split_keys, *sets[name])
    return made | {f"loss, {kind}": partial(losses, kind) for kind in ("kl", "alpha", "lambda")}


def result(check: Callable[[], Errors]) -> Errors | str:
    """Return the errors, or the traceback of a check that failed, so that other checks still run."""
    try:
        return check()
    except Exception:
        return traceback.format_exc()


if __name__ == "__main__":
    allow_new_numpy()
    print(json.dumps({name: result(check) for name, check in checks().items()}))
