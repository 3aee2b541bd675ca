"""Which attention runs on a GPU: cuDNN for large regular blocks, Triton for everything else.

cuDNN is called through aten, whose ops take and return lse. Which rows go to which of them, ``attention_parts`` decides.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from eagle_ds.kernels.attention import BlockAttention, KeyBounds, ReferenceAttention
from eagle_ds.kernels.attention_parts import BACKWARD, FORWARD, Cut, Part, keys_behind
from eagle_ds.parallel.copies import copy_rows

logger = logging.getLogger(__name__)

HOPPER = 132  # multiprocessors
FEW_BLOCKS = 2  # of a part: their sums are rounded as they come, which saves passes over float32


class TritonBackend:
    """Interval attention and diagonals in Triton. ``programs``: multiprocessors of the GPU."""

    def __init__(self, head_dim: int = 128, programs: int = HOPPER) -> None:
        from eagle_ds.kernels import diagonal_triton
        from eagle_ds.kernels.attention_triton import TritonAttention

        self.programs = programs
        intervals = TritonAttention(head_dim, programs)
        self.forward, self.backward = intervals.forward, intervals.backward
        self.diagonal_forward, self.diagonal_backward = diagonal_triton.diagonal_forward, diagonal_triton.diagonal_backward


class CudnnBackend(TritonBackend):
    """cuDNN for causal squares and full blocks, Triton for what is left of each row's keys and for the diagonals."""

    def __init__(
        self, head_dim: int = 128, programs: int = HOPPER, forward_cut: Cut = FORWARD, backward_cut: Cut = BACKWARD
    ) -> None:
        from eagle_ds.kernels import sums_triton

        super().__init__(head_dim, programs)
        self.triton_forward, self.triton_backward = self.forward, self.backward
        self.forward, self.backward = self._forward, self._backward
        self.merge_into, self.add_into = sums_triton.merge_into, sums_triton.add_into
        self.forward_cut, self.backward_cut = forward_cut, backward_cut

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, bounds: KeyBounds, scale: float) -> tuple[Tensor, Tensor]:
        cut = self.forward_cut.of_heads(q.shape[1])
        done = [self._part_forward(q[p.start : p.stop], k, v, bounds, p, scale) for p in _parts(bounds, cut)]
        return _joined([out for out, _ in done]), _joined([lse for _, lse in done])

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: KeyBounds, scale: float,
        dk: Tensor, dv: Tensor,
    ) -> Tensor:  # fmt: skip
        done = []
        for part in _parts(bounds, self.backward_cut.of_heads(q.shape[1])):
            rows = slice(part.start, part.stop)
            done.append(self._part_backward(dout[rows], q[rows], k, v, out[rows], lse[rows], bounds, part, scale, dk, dv))
        return _joined(done)

    def _part_forward(self, q: Tensor, k: Tensor, v: Tensor, bounds: KeyBounds, part: Part, scale: float) -> tuple[Tensor, Tensor]:
        """(out, lse) of the part's rows."""
        if part.square is None:
            out, lse = self.triton_forward(q, k, v, _behind_blocks(bounds, part), scale)
        else:
            q = _padded(q, part.size + part.padding)
            out, lse = _cudnn_forward(q, *(_padded(x[part.square : part.square + len(q)], len(q)) for x in (k, v)), True, scale)
        out = out.to(_type_of_sums(part, q))
        for block in part.blocks:
            rows, keys = slice(block.start, block.stop), slice(block.first_key, block.last_key)
            self.merge_into(out[rows], lse[rows], *_cudnn_forward(q[rows], k[keys], v[keys], False, scale))
        return out[: part.size].to(q.dtype), lse[: part.size]

    def _part_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: KeyBounds, part: Part, scale: float,
        dk: Tensor, dv: Tensor,
    ) -> Tensor:  # fmt: skip
        """dq of the part's rows; dk and dv are added."""
        if part.square is None:
            dq = self.triton_backward(dout, q, k, v, out, lse, _behind_blocks(bounds, part), scale, dk, dv)
        else:
            dout, q, out = (_padded(x, part.size + part.padding) for x in (dout, q, out))
            lse = _padded(lse, len(q), torch.inf)  # p = exp(s - inf) = 0: padding gives no gradient to keys
            keys = slice(part.square, part.square + len(q))
            dq, *gradients = _cudnn_backward(dout, q, *(_padded(x[keys], len(q)) for x in (k, v)), out, lse, True, scale)
            self.add_into(dk[keys], dv[keys], *(g[: len(dk[keys])] for g in gradients))
        dq = dq.to(_type_of_sums(part, q))
        for block in part.blocks:
            rows, keys = slice(block.start, block.stop), slice(block.first_key, block.last_key)
            block_dq, *gradients = _cudnn_backward(dout[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], False, scale)
            self.add_into(dk[keys], dv[keys], *gradients)
            dq[rows] += block_dq
        return dq[: part.size].to(q.dtype)


def _parts(bounds: KeyBounds, cut: Cut) -> list[Part]:
    """How the rows are cut, worked out once for each bounds."""
    if cut not in bounds.memo:
        bounds.memo[cut] = list(cut(bounds)) or [Part(0, 0)]
    return bounds.memo[cut]


def _behind_blocks(bounds: KeyBounds, part: Part) -> KeyBounds:
    """Bounds of the part's rows and of the keys behind their full blocks."""
    if part not in bounds.memo:
        own = bounds.rows(part.start, part.stop)
        if part.blocks:
            own = KeyBounds.make(keys_behind(bounds, part), own.hi, own.lo_device.device)
        bounds.memo[part] = own
    return bounds.memo[part]


def _padded(x: Tensor, rows: int, value: float = 0.0) -> Tensor:
    """[n, ...] -> [rows, ...], with rows of ``value`` behind."""
    return x if len(x) == rows else _joined([x, x.new_full((rows - len(x), *x.shape[1:]), value)])


def _joined(parts: list[Tensor]) -> Tensor:
    """Rows one after another, whatever the order of rows and heads in memory."""
    if len(parts) == 1:
        return parts[0]
    joined = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for to, part in zip(joined.split([len(part) for part in parts]), parts, strict=True):
        copy_rows(to, part)
    return joined


def _type_of_sums(part: Part, q: Tensor) -> torch.dtype:
    """Where many blocks are added up, one rounding to half precision after each would be many."""
    return torch.float32 if len(part.blocks) > FEW_BLOCKS else q.dtype


def _heads_first(x: Tensor) -> Tensor:
    """[rows, heads, d] -> [1, heads, rows, d], a view."""
    return x.transpose(0, 1).unsqueeze(0)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        _heads_first(q), _heads_first(k), _heads_first(v), None, True, 0.0, causal, False, scale=scale
    )
    return out.squeeze(0).transpose(0, 1), lse.reshape(q.shape[1], q.shape[0]).t()


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        _heads_first(dout), _heads_first(q), _heads_first(k), _heads_first(v), _heads_first(out),
        lse.t().contiguous().view(1, q.shape[1], q.shape[0], 1), seed, seed, None, None, None, q.shape[0], k.shape[0],
        0.0, causal, scale=scale,
    )  # fmt: skip
    dq, dk, dv = (g.squeeze(0).transpose(0, 1) for g in grads)
    return dq, dk, dv


def choose_attention(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> BlockAttention:
    """The fastest backend that this device and these shapes have; the choice is logged once."""
    backend, reason = _choose(torch.device(device), dtype, head_dim)
    logger.info("attention backend: %s (%s)", type(backend).__name__, reason)
    return backend


def _choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[BlockAttention, str]:
    if device.type != "cuda":
        return ReferenceAttention(), f"plain PyTorch on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return ReferenceAttention(), f"plain PyTorch: the GPU kernels take bfloat16 and float16, not {dtype}"
    if head_dim & (head_dim - 1) or not 16 <= head_dim <= 256:
        return ReferenceAttention(), f"plain PyTorch: head_dim {head_dim} is not a power of two from 16 to 256"
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    if head_dim > 128 or torch.cuda.get_device_capability(device) < (9, 0) or not torch.backends.cudnn.is_available():
        return TritonBackend(head_dim, programs), "cuDNN's attention with lse wants head_dim up to 128 and compute capability 9.0 or newer"
    return CudnnBackend(head_dim, programs), f"cuDNN {torch.backends.cudnn.version()} for large blocks, Triton for the rest"
