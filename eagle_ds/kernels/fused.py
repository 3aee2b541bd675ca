"""Whether a GPU's own kernels take a tensor, or the plain version does: asked by every pair of the two."""

from __future__ import annotations

import torch
from torch import Tensor


def is_half_on_gpu(x: Tensor) -> bool:
    """What Triton's kernels, and matmuls from half precision to float32, take."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
