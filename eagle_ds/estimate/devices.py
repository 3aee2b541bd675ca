"""Memory and speed of the GPUs that estimates can be made for, and a look-up of the one in this machine."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from dataclasses import dataclass

from eagle_ds.config.settings import join_or

GIB = 1 << 30
MEMORY_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(gib|gb)", re.IGNORECASE)
# Share of a device's memory that tensors may fill; the allocator loses the rest to fragmentation
USABLE = 0.95
H200_DENSE_BF16_TFLOPS = 989  # data sheet; other GPUs are scaled against it


@dataclass(frozen=True)
class Device:
    """An accelerator: its memory in GiB and its rates in TFLOP/s (0: no rate known).

    Attributes:
        source: how the rates were found, for the text of ``--plan``.
    """

    name: str
    memory_gib: float
    matmul_tflops: float = 0.0
    attention_forward_tflops: float = 0.0
    attention_backward_tflops: float = 0.0
    source: str = "no measured rate"

    @property
    def usable_bytes(self) -> int:
        """Bytes that a training step may fill."""
        return int(self.memory_gib * GIB * USABLE)


def _scaled(name: str, memory_gib: float, dense_bf16_tflops: float) -> Device:
    """Return a device whose rates are the H200's, scaled by the ratio of the dense BF16 rates on data sheets.
    """
    factor = dense_bf16_tflops / H200_DENSE_BF16_TFLOPS
    source = "H200's measured rates scaled by data sheet"
    return Device(name, memory_gib, 738 * factor, 561 * factor, 537 * factor, source)


DEVICES = {
    "h200": Device("h200", 139.8, 738, 561, 537, "measured: 8192^3 matmul; cuDNN attention, 128K, causal"),
    "h100": _scaled("h100", 79.6, 989),
    "a100": _scaled("a100", 79.3, 312),
    "b200": _scaled("b200", 178.4, 2250),
    "cpu": Device("cpu", math.inf),
}


def find_device(name: str | None) -> Device:
    """Return the device called ``name``; without a name, the GPU that ``nvidia-smi`` lists, else an H200.

    A memory size as ``name``, such as 48GiB (2^30 bytes) or 48GB (10^9), stands for a GPU with this memory
    and unknown rates.

    Raises ValueError for another name that is not in ``DEVICES``, and for a memory of 0.
    """
    if name is None:
        listed = ""
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
            listed = subprocess.run(query, capture_output=True, text=True, check=False).stdout.lower()
        name = next((known for known in DEVICES if known in listed), "h200")
    if size := MEMORY_SIZE.fullmatch(name):
        return _of_memory(name, float(size[1]) * (GIB if size[2].lower() == "gib" else 1e9))
    if name.lower() not in DEVICES:
        known = join_or([*DEVICES, "a memory size such as 48GiB"])
        raise ValueError(f"--gpu {name} is not a device that --plan knows; use {known}")
    return DEVICES[name.lower()]


def _of_memory(name: str, memory_bytes: float) -> Device:
    if not memory_bytes:
        raise ValueError(f"--gpu {name} has no memory; give that of your GPU, such as 48GiB")
    return Device(f"a GPU of {name}", memory_bytes / GIB)
