"""Rotary position embedding (arXiv:2104.09864), half-split pairs (i, i + d/2), with the scalings that targets use.

Frequencies and angles are float32, as serving engines compute them, so that a draft meets at position 131071 the
rotation that it was trained with; float64 inputs get float64 angles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eagle_ds.config.sections import RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[Tensor, float]:
    """(float64 [d/2] frequencies, factor on cos and sin). Raises ValueError where a scaling lacks a value it needs."""
    plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    kind = scaling.rope_type if scaling else "default"
    if scaling is None or kind == "default":
        return plain, 1.0
    if kind == "linear":
        return plain / scaling.factor, 1.0
    original = scaling.original_max_position_embeddings
    if original is None:
        raise ValueError(f"rope_type {kind} needs original_max_position_embeddings")
    return _llama3(plain, scaling, original) if kind == "llama3" else _yarn(plain, scaling, original, head_dim, theta)


def _llama3(plain: Tensor, scaling: RopeScaling, original: int) -> tuple[Tensor, float]:
    """Llama 3.1: slow turns are divided by ``factor``, fast ones kept, those between interpolated."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if low is None or high is None or low >= high:
        raise ValueError(f"rope_type llama3 needs low_freq_factor < high_freq_factor, found {low} and {high}")
    turns = original * plain / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / scaling.factor, 1.0


def _yarn(plain: Tensor, scaling: RopeScaling, original: int, head_dim: int, theta: float) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071): a ramp over dimensions between ``beta_fast`` and ``beta_slow`` turns."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    frequencies = plain * (1 - ramp) + plain / scaling.factor * ramp
    return frequencies, _yarn_magnitude(scaling)


def _yarn_magnitude(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)


def rotation(positions: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) of ``positions`` [M], each [M, 1, d/2] in ``dtype``."""
    angle_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    angles = positions.to(angle_dtype)[:, None, None] * frequencies.to(angle_dtype)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
