"""Which attention runs on a GPU: cuDNN for large regular blocks, Triton for everything else.

cuDNN is called through aten, whose ops take and return lse. Which rows go to which of them, ``attention_parts`` decides.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from eagle_ds.model.attention import BlockAttention, KeyBounds, ReferenceAttention
from eagle_ds.model.attention_parts import BACKWARD, FORWARD, Cut, Part, keys_behind, run_blocks

logger = logging.getLogger(__name__)


class TritonBackend:
    """Interval attention and diagonals in Triton."""

    def __init__(self, head_dim: int = 128) -> None:
        from eagle_ds.model import diagonal_triton
        from eagle_ds.model.attention_triton import TritonAttention

        intervals = TritonAttention(head_dim)
        self.forward, self.backward = intervals.forward, intervals.backward
        self.diagonal_forward, self.diagonal_backward = diagonal_triton.diagonal_forward, diagonal_triton.diagonal_backward


class CudnnBackend(TritonBackend):
    """cuDNN for runs and stairs, Triton for the other rows and for the diagonals."""

    def __init__(self, head_dim: int = 128, forward_cut: Cut = FORWARD, backward_cut: Cut = BACKWARD) -> None:
        from eagle_ds.model import sums_triton

        super().__init__(head_dim)
        self.triton_forward, self.triton_backward = self.forward, self.backward
        self.forward, self.backward = self._forward, self._backward
        self.merge_into, self.add_into = sums_triton.merge_into, sums_triton.add_into
        self.forward_cut, self.backward_cut = forward_cut, backward_cut

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, bounds: KeyBounds, scale: float) -> tuple[Tensor, Tensor]:
        done = []
        for part in _parts(bounds, self.forward_cut):
            own, rows = _rows_of(bounds, part), q[part.start : part.stop]
            if part.kind == "rows":
                done.append(self.triton_forward(rows, k, v, own, scale))
            elif part.kind == "stairs":
                done.append(self.triton_forward(rows, k, v, own, scale, self._stairs_forward(rows, k, v, part, scale)))
            else:
                done.append(self._run_forward(rows, k, v, own, part.kind == "causal run", scale))
        if len(done) == 1:
            return done[0]
        return torch.cat([out for out, _ in done]), torch.cat([lse for _, lse in done])

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: KeyBounds, scale: float,
        dk: Tensor, dv: Tensor,
    ) -> Tensor:  # fmt: skip
        done = []
        for part in _parts(bounds, self.backward_cut):
            a, b = part.start, part.stop
            rows, own = (dout[a:b], q[a:b], k, v, out[a:b], lse[a:b]), _rows_of(bounds, part)
            if part.kind == "rows":
                done.append(self.triton_backward(*rows, own, scale, dk, dv))
            elif part.kind == "stairs":
                done.append(self.triton_backward(*rows, own, scale, dk, dv, self._stairs_backward(*rows, part, scale, dk, dv)))
            else:
                done.append(self._run_backward(*rows, own, part.kind == "causal run", scale, dk, dv))
        return done[0] if len(done) == 1 else torch.cat(done)

    def _run_forward(self, q: Tensor, k: Tensor, v: Tensor, bounds: KeyBounds, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        done = None
        for keys, square in run_blocks(bounds, causal):
            block = _cudnn_forward(q, k[keys], v[keys], square, scale)
            if done is None:
                done = block
            else:
                self.merge_into(*done, *block)
        return done or _nothing_seen(q)

    def _run_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: KeyBounds,
        causal: bool, scale: float, dk: Tensor, dv: Tensor,
    ) -> Tensor:  # fmt: skip
        total = None
        for keys, square in run_blocks(bounds, causal):
            dq, *gradients = _cudnn_backward(dout, q, k[keys], v[keys], out, lse, square, scale)
            self.add_into(dk[keys], dv[keys], *gradients)
            total = dq if total is None else total.add_(dq)
        return torch.zeros_like(q) if total is None else total

    def _stairs_forward(self, q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
        """(out, lse) of the part's rows over their full blocks."""
        out, lse = _nothing_seen(q)
        for start, stop, first_key, last_key in part.blocks:
            block = _cudnn_forward(q[start:stop], k[first_key:last_key], v[first_key:last_key], False, scale)
            self.merge_into(out[start:stop], lse[start:stop], *block)
        return out, lse

    def _stairs_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: Part, scale: float, dk: Tensor, dv: Tensor
    ) -> Tensor:  # fmt: skip
        """dq of the part's rows from their full blocks, whose dk and dv are added."""
        total = torch.zeros_like(q)
        for start, stop, first_key, last_key in part.blocks:
            rows, keys = slice(start, stop), slice(first_key, last_key)
            dq, *gradients = _cudnn_backward(dout[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], False, scale)
            self.add_into(dk[keys], dv[keys], *gradients)
            total[rows] += dq
        return total


def _parts(bounds: KeyBounds, cut: Cut) -> list[Part]:
    """How the rows are cut, worked out once for each bounds."""
    if cut not in bounds.memo:
        bounds.memo[cut] = list(cut(bounds)) or [Part(0, 0, "rows")]
    return bounds.memo[cut]


def _rows_of(bounds: KeyBounds, part: Part) -> KeyBounds:
    """Bounds of the part's rows; for stairs, of the keys behind the full blocks."""
    if part not in bounds.memo:
        own = bounds.rows(part.start, part.stop)
        if part.blocks:
            own = KeyBounds.make(keys_behind(bounds, part), own.hi, own.lo_device.device)
        bounds.memo[part] = own
    return bounds.memo[part]


def _nothing_seen(q: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of rows without keys."""
    return torch.zeros_like(q), torch.full(q.shape[:2], -torch.inf, device=q.device)


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
    if head_dim > 128 or torch.cuda.get_device_capability(device) < (9, 0) or not torch.backends.cudnn.is_available():
        return TritonBackend(head_dim), "cuDNN's attention with lse wants head_dim up to 128 and compute capability 9.0 or newer"
    return CudnnBackend(head_dim), f"cuDNN {torch.backends.cudnn.version()} for large blocks, Triton for the rest"
