"""Choose the implementation of every operation: plain PyTorch, Triton or cuDNN.

Each choice is made once, depends on device and dtype alone, and is logged:

    attention        `choose_attention`, once per run. The object is passed to the model.
    everything else  `operations_for(x)`, once per (device type, dtype). Norms, RoPE, SwiGLU, rows and loss.

`operations_for` looks at a tensor, not at a module, because modules are moved to another device and cast to
another dtype after they are built. After the first call with a device and a dtype it is one cache lookup.

`PlainOperations` is the reference and the CPU path. `operations_triton.TritonOperations` has the same methods
for half precision on a GPU. Triton is an optional dependency, so its modules are imported by the two
functions that choose, and by nothing else in the package that a CPU machine imports.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle_ds.kernels.attention import ReferenceAttention
from eagle_ds.kernels.loss import PlainKernels

logger = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)


def is_half_on_gpu(x: Tensor) -> bool:
    """Return whether the Triton kernels, and matmuls from half precision to float32, support ``x``."""
    return x.is_cuda and x.dtype in HALF


class PlainOperations:
    """Every operation in plain PyTorch: the reference, and the CPU path."""

    loss: type[PlainKernels] = PlainKernels

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return weight * x / sqrt(mean(x^2) + eps), x [M, W] (arXiv:1910.07467). Differentiable."""
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def norm_into(z: Tensor, column: int, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Overwrite W columns of z [M, *], from ``column`` on, with ``rms_norm(x)``, x [M, W]; return z.

        Differentiable in x, the weight and the other columns of z. The overwritten values must not need a
        gradient, because the backward does not zero their columns of the gradient of z.
        """
        z[:, column : column + len(weight)] = PlainOperations.rms_norm(x, weight, eps)
        return z

    @staticmethod
    def norm_rows_into(
        z: Tensor, column: int, table: Tensor, rows: Tensor, weight: Tensor, eps: float
    ) -> Tensor:
        """Do ``norm_into`` with x = table[rows], for a frozen table [V, W] and int64 rows [M]."""
        return PlainOperations.norm_into(z, column, F.embedding(rows, table.detach()), weight, eps)

    @staticmethod
    def rms_norm_gradients(
        grad: Tensor, x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None,
        dx: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return dw [W] of ``rms_norm(x)`` for the gradient ``grad`` [M, W]; on a GPU in float32.

        No autograd. With ``rows`` the input was x[rows]. ``dx`` [M, W], if given, is overwritten.
        """
        leaves = [t.detach().requires_grad_() for t in (x if rows is None else x[rows], weight)]
        with torch.enable_grad():
            y = PlainOperations.rms_norm(*leaves, eps)
        d_x, d_weight = torch.autograd.grad(y, leaves, grad)
        if dx is not None:
            dx.copy_(d_x)
        return d_weight

    @staticmethod
    def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the pairs (i, i + d/2) of x [M, heads, d]; cos and sin [M, 1, d/2]. Differentiable in x."""
        first, second = x.to(cos.dtype).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    @staticmethod
    def rotate_into(y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> None:
        """Overwrite y with ``rope(x)``, or with the inverse rotation if ``back``. No autograd.

        Both are [M, heads, d]; their rows may be strided.
        """
        y.copy_(PlainOperations.rope(x, cos, -sin if back else sin))

    @staticmethod
    def swiglu(gate: Tensor, up: Tensor, *, overwrite: bool = False) -> Tensor:
        """Return silu(gate) * up, both [M, I] (arXiv:2002.05202). Differentiable; keeps gate and up only.

        ``overwrite`` states that nothing but this backward reads gate and up. A GPU then overwrites them with
        their gradients, and a second backward through the same graph raises RuntimeError.
        """
        return F.silu(gate) * up

    @staticmethod
    def take_rows(table: Tensor, index: Tensor, columns: int) -> Tensor:
        """Return table[index, :columns], table [M, W], int64 index [n]. No autograd."""
        return table[:, :columns][index]

    @staticmethod
    def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
        """Do total[index[i], :columns] += rows[i] for rows [n, columns]; ``total`` float32 at least.

        Rows with the same index must be zero, as rows past the end of a document are. The GPU kernel adds
        without atomics, so it can lose one of two additions to the same place.
        """
        total[:, : rows.shape[1]].index_add_(0, index, rows.to(total.dtype))

    @staticmethod
    def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
        """Do total += a @ b. The GPU version is one kernel, which adds a @ b before rounding it."""
        total += a @ b


def operations_for(x: Tensor) -> type[PlainOperations]:
    """Return the operations for tensors with the device and dtype of ``x``."""
    return _operations(x.is_cuda, x.dtype)


@cache
def _operations(on_gpu: bool, dtype: torch.dtype) -> type[PlainOperations]:
    if not (on_gpu and dtype in HALF):
        logger.info("operations: plain PyTorch for %s on %s", dtype, "GPU" if on_gpu else "CPU")
        return PlainOperations
    from eagle_ds.kernels.operations_triton import TritonOperations

    logger.info("operations: Triton kernels for %s on GPU", dtype)
    return TritonOperations


def choose_attention(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> ReferenceAttention:
    """Return the fastest attention for this device, dtype and head width, and log the choice."""
    backend, reason = _choose_attention(torch.device(device), dtype, head_dim)
    logger.info("attention backend: %s (%s)", type(backend).__name__, reason)
    return backend


def _choose_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[ReferenceAttention, str]:
    """Return (backend, reason for the choice)."""
    plain = ReferenceAttention()
    if device.type != "cuda":
        return plain, f"plain PyTorch on {device.type}"
    if dtype not in HALF:
        return plain, f"plain PyTorch: the GPU kernels support bfloat16 and float16, not {dtype}"
    if head_dim & (head_dim - 1) or not 16 <= head_dim <= 256:
        return plain, f"plain PyTorch: head_dim {head_dim} is not a power of two from 16 to 256"
    from eagle_ds.kernels.attention_cudnn import CudnnBackend
    from eagle_ds.kernels.attention_triton import TritonBackend

    programs = torch.cuda.get_device_properties(device).multi_processor_count
    hopper = torch.cuda.get_device_capability(device) >= (9, 0)
    if head_dim > 128 or not hopper or not torch.backends.cudnn.is_available():
        reason = "cuDNN's attention with lse needs head_dim <= 128 and compute capability 9.0"
        return TritonBackend(head_dim, programs), reason
    version = torch.backends.cudnn.version()
    return CudnnBackend(head_dim, programs), f"cuDNN {version} for large rectangles, Triton for the rest"
