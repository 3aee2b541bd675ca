"""Rotary position embedding (RoPE, arXiv:2104.09864) of the pairs (i, i + d/2), and its scalings.

The pair i is rotated by the angle position * frequency_i, with frequency_i = theta^(-2i/d). Serving engines
compute frequencies and angles in float32, and so does this file: a draft is then served with exactly the
rotation that it was trained with, at position 131071 too. float64 models get float64 angles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eagle_ds.config.sections import ROPE_NEEDS, RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[Tensor, float]:
    """Return (float64 [d/2] frequencies, factor on cos and sin).

    Raises:
        ValueError: the kind of scaling is unknown, or a value that it needs is missing.
    """
    plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if scaling is None or scaling.rope_type == "default":
        return plain, 1.0
    if scaling.rope_type == "linear":
        return plain / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(plain, scaling)
    if scaling.rope_type == "yarn":
        return _yarn(plain, scaling, head_dim, theta)
    known = ", ".join(ROPE_NEEDS)
    raise ValueError(f"rope_type {scaling.rope_type} has no frequencies here; the kinds are {known}")


def _original_length(scaling: RopeScaling) -> int:
    """Return the context length in tokens before scaling."""
    if scaling.original_max_position_embeddings is None:
        raise ValueError(f"rope_type {scaling.rope_type} needs original_max_position_embeddings")
    return scaling.original_max_position_embeddings


def _llama3(plain: Tensor, scaling: RopeScaling) -> tuple[Tensor, float]:
    """Llama 3.1: divide low frequencies by ``factor``, keep high ones, interpolate between."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if low is None or high is None or low >= high:
        raise ValueError(f"rope_type llama3 needs low_freq_factor < high_freq_factor, found {low} and {high}")
    # Full turns within the original context decide what is low and what is high.
    turns = _original_length(scaling) * plain / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / scaling.factor, 1.0


def _yarn(plain: Tensor, scaling: RopeScaling, head_dim: int, theta: float) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071): keep high frequencies, divide low ones by ``factor``, interpolate between.

    Frequencies that make at least ``beta_fast`` turns within the original context are kept. Those that make
    at most ``beta_slow`` turns are divided.
    """
    original = _original_length(scaling)

    def dimension(turns: float) -> float:
        """Return the dimension, as a real number, whose frequency makes ``turns`` turns."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    magnitude = scaling.attention_factor
    if magnitude is None:
        magnitude = yarn_magnitude(scaling.factor, scaling.mscale, scaling.mscale_all_dim)
    return plain * (1 - ramp) + plain / scaling.factor * ramp, magnitude


def yarn_magnitude(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """Return the factor on cos and sin that YaRN derives; attention scores are multiplied by its square."""

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return magnitude(mscale) / magnitude(mscale_all_dim) if mscale and mscale_all_dim else magnitude(1.0)


def rotation(
    positions: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) of ``positions`` [M], each [M, 1, d/2] in ``dtype``: float32 or float64."""
    angles = positions.to(dtype)[:, None, None] * frequencies.to(dtype)
    return angles.cos() * factor, angles.sin() * factor
