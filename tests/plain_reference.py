"""A second implementation of docs/maths.md, for tests: dense, one document at a time, with every mask.

Nothing here is shared with the package but the rotary frequencies, which ``test_export.py`` checks against
transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eagle_ds.kernels.rope import inverse_frequencies
from eagle_ds.model.arch import DraftArch


@dataclass
class ReferenceSums:
    """Sums over all documents, one number for each TTT step."""

    loss: Tensor
    counted: Tensor
    trained: Tensor
    correct: Tensor
    alpha: Tensor
    length: Tensor


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def _rope(x: Tensor, positions: Tensor, arch: DraftArch) -> Tensor:
    frequencies, factor = inverse_frequencies(arch.head_dim, arch.rope_theta, arch.rope_scaling)
    angle = positions.to(x.dtype)[:, None] * frequencies.to(x.dtype)
    cos, sin = (torch.cat([f, f], -1)[:, None] * factor for f in (angle.cos(), angle.sin()))
    half = arch.head_dim // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def _linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ w[f"{name}.weight"].t()
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _shift(x: Tensor, n: int) -> Tensor:
    return torch.cat([x[n:], torch.zeros_like(x[:n])]) if n < len(x) else torch.zeros_like(x)


def unroll(w: dict[str, Tensor], arch: DraftArch, ids: Tensor, aux: Tensor, steps: int) -> list[Tensor]:
    """Return the states g_1 .. g_T of all rows of one document, before the final norm."""
    eps, size, heads = arch.rms_norm_eps, len(ids), arch.num_attention_heads
    if arch.norm_before_fc:
        aux = _norm(aux, w["input_norm.weight"], eps)
    if arch.fc_norm:
        aux = torch.cat([
            _norm(part, w[f"fc_norm.{i}.weight"], eps) for i, part in enumerate(aux.chunk(arch.num_aux, -1))
        ], -1)
    g, position = aux @ w["fc.weight"].t(), torch.arange(size)
    keys, values, states = [], [], []
    for k in range(steps):
        e = _norm(w["embed_tokens.weight"][_shift(ids, 1 + k)], w["midlayer.input_layernorm.weight"], eps)
        z = torch.cat([e, _norm(g, w["midlayer.hidden_norm.weight"], eps)], -1)
        q, key, value = (
            _linear(w, f"midlayer.self_attn.{n}_proj", z).view(size, -1, arch.head_dim) for n in "qkv"
        )
        if arch.qk_norm:
            q = _norm(q, w["midlayer.self_attn.q_norm.weight"], eps)
            key = _norm(key, w["midlayer.self_attn.k_norm.weight"], eps)
        q, key = _rope(q, position + k, arch), _rope(key, position + k, arch)
        keys.append(key.repeat_interleave(heads // key.shape[1], 1))
        values.append(value.repeat_interleave(heads // value.shape[1], 1))
        scores = [torch.einsum("phd,jhd->hpj", q, keys[0])]
        seen = position[None] <= position[:, None]
        if arch.sliding_window:
            seen &= position[None] > position[:, None] + k - arch.sliding_window
        scores[0] = scores[0].masked_fill(~seen, -torch.inf)
        scores += [torch.einsum("phd,phd->hp", q, keys[i])[..., None] for i in range(1, k + 1)]
        p = torch.softmax(torch.cat(scores, -1) * arch.head_dim**-0.5, -1)
        out = torch.einsum("hpj,jhd->phd", p[..., :size], values[0])
        for i in range(1, k + 1):
            out = out + p[..., size + i - 1].t()[..., None] * values[i]
        residual = z[:, arch.hidden_size :] if arch.norm_before_residual else g
        g = residual + _linear(w, "midlayer.self_attn.o_proj", out.flatten(1))
        y = _norm(g, w["midlayer.post_attention_layernorm.weight"], eps)
        gate, up = (y @ w[f"midlayer.mlp.{n}_proj.weight"].t() for n in ("gate", "up"))
        g = g + (gate * torch.sigmoid(gate) * up) @ w["midlayer.mlp.down_proj.weight"].t()
        states.append(g)
        if arch.norm_output:
            g = _norm(g, w["head.norm_weight"], eps)
    return states


def trained_at(mask: np.ndarray, p: int, k: int, alignment: str) -> bool:
    """Whether row p is trained at step k, exactly as docs/maths.md, section 3, says it."""
    if alignment == "feature":
        return p + k < len(mask) - 1 and bool(mask[p + k])
    return p + 2 + k < len(mask) and all(mask[p + 1 : p + 3 + k])


def document_sums(
    w: dict[str, Tensor], arch: DraftArch, head: Tensor, t2d: Tensor, ids: Tensor, mask: np.ndarray,
    aux: Tensor, hidden: Tensor, steps: int, alignment: str, kind: str, mix: Tensor | None,
) -> ReferenceSums:
    """Compute the sums of one document; ``mix`` [T] is the weight w of the lambda loss."""
    eps = arch.rms_norm_eps
    target_logits, kept = hidden @ head.t(), t2d.nonzero().squeeze(-1)
    token = target_logits.argmax(-1)
    rows = {name: [] for name in ("loss", "counted", "trained", "correct", "alpha")}
    accepted = torch.zeros(len(ids), steps, dtype=head.dtype)
    any_trained = torch.zeros(len(ids), dtype=torch.bool)
    for k, state in enumerate(unroll(w, arch, ids, aux, steps)):
        logits = _norm(state, w["head.norm_weight"], eps) @ w["head.weight"].t()
        trained = torch.tensor([trained_at(mask, p, k, alignment) for p in range(len(ids))])
        z, t = _shift(target_logits, 1 + k), _shift(token, 1 + k)
        counted = trained & t2d[t]
        log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(z[:, kept], -1)
        q_full = torch.softmax(z, -1)[:, kept]
        alpha = torch.minimum(q_full, log_p.exp()).sum(-1)
        cross = -(log_q.exp() * log_p).sum(-1)
        if kind == "kl":
            loss = cross
        elif kind == "alpha":
            loss = -torch.log(alpha)
        else:
            loss = mix[k] * (cross + (log_q.exp() * log_q).sum(-1)) + (1 - mix[k]) * (1 - alpha)
        accepted[counted, k] = alpha.detach()[counted]
        any_trained |= trained
        rows["loss"].append(loss[counted].sum())
        rows["counted"].append(counted.sum())
        rows["trained"].append(trained.sum())
        rows["correct"].append((kept[logits.argmax(-1)] == t)[trained].sum())
        rows["alpha"].append(alpha.detach()[counted].sum())
    length = torch.stack([accepted.cumprod(1).sum(), any_trained.sum().to(head.dtype)])
    return ReferenceSums(**{name: torch.stack(values) for name, values in rows.items()}, length=length)
