"""Row-wise work of the loss on a GPU, from logits to losses and their gradient, one program a row.

loss.py has the formulae. A row of draft logits z (float32 [Vd]) is read two or three times:

    first    max, sum of exponentials and argmax, in one pass (online softmax)
    second   cross-entropy, acceptance and, for the `kl` loss, the gradient
    third    the gradient of the `alpha` and `lambda` losses, which need the row's acceptance first

Labels are never written to memory: q_v = exp(t_v - lse_draft) and q'_v = exp(t_v - lse_full) are computed
from the target logits t in registers. With Vd = 32000 a row has 128 KB. A program is wide (16 warps), so only
about a hundred rows are processed at a time, and later readings mostly come from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eagle_ds.kernels.loss import PlainKernels

BLOCK, WARPS = 8192, 16  # columns of one iteration, warps of a program
MODES = {"kl": 0, "alpha": 1, "lambda": 2}


@triton.jit
def _label_kernel(Target, Lse, Entropy, vocab, BLOCK: tl.constexpr):
    """Log-sum-exp and entropy of one row of target logits t.

    With m = max t, e_v = exp(t_v - m) and Z = sum e_v: lse = m + log Z, and
    entropy = -sum (e_v / Z) log(e_v / Z) = log Z - sum e_v (t_v - m) / Z.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    peak = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for start in tl.range(0, vocab, BLOCK):
        real = start + columns < vocab
        t = tl.load(Target + row * vocab + start + columns, mask=real, other=float("-inf"))
        peak = tl.maximum(peak, t)
    top = tl.max(peak, 0)
    totals = tl.zeros([BLOCK], dtype=tl.float32)
    dots = tl.zeros([BLOCK], dtype=tl.float32)
    for start in tl.range(0, vocab, BLOCK):
        real = start + columns < vocab
        above = tl.load(Target + row * vocab + start + columns, mask=real, other=float("-inf")) - top
        p = tl.exp(above)
        totals += p
        # Masked columns are -inf and give p = 0. Without the test 0 * -inf would be NaN.
        dots += tl.where(p > 0, p * above, 0.0)
    total = tl.sum(totals, 0)
    tl.store(Lse + row, top + tl.log(total))
    tl.store(Entropy + row, tl.log(total) - tl.sum(dots, 0) / total)


@triton.jit
def _acceptance_gradient(z, t, lse, lse_draft, lse_full, below_sum, alpha, mix, MODE: tl.constexpr):
    """Gradient with respect to the draft's logits z of the losses made of alpha = sum_v min(p_v, q'_v).

    With m_v = [p_v < q'_v], dalpha/dz_v = p_v * (m_v - sum_u m_u p_u), and ``below_sum`` is that sum.
    """
    p, q = tl.exp(z - lse), tl.exp(t - lse_draft)
    d_alpha = p * (tl.where(p < tl.exp(t - lse_full), 1.0, 0.0) - below_sum)
    if MODE == 1:  # noqa: SIM108 (a constexpr branch, not a value)
        d = -d_alpha / alpha
    else:
        d = mix * (p - q) - (1 - mix) * d_alpha
    return d


@triton.jit
def _row_kernel(Logits, Target, TargetRow, LseDraft, LseFull, Mix, Weight, CrossEntropy, Alpha, Best, DLogits,
                vocab, MODE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Losses of one row, and with GRADIENT its weighted gradient. MODE is the loss, see MODES."""
    row = tl.program_id(0).to(tl.int64)
    target_row = tl.load(TargetRow + row)
    Logits += row * vocab
    Target += target_row * vocab
    lse_draft, lse_full = tl.load(LseDraft + target_row), tl.load(LseFull + target_row)
    columns = tl.arange(0, BLOCK)
    # First reading. Each of BLOCK lanes keeps its own running max, its place, and its sum of exp(z - max).
    peaks = tl.load(Logits + columns, mask=columns < vocab, other=float("-inf"))
    places = columns
    totals = tl.where(columns < vocab, 1.0, 0.0)
    for start in tl.range(BLOCK, vocab, BLOCK):
        z = tl.load(Logits + start + columns, mask=start + columns < vocab, other=float("-inf"))
        higher = z > peaks
        shrink = tl.exp(-tl.abs(z - peaks))  # factor of the lower of the two; 0 for masked columns
        totals = tl.where(higher, totals * shrink + 1.0, totals + shrink)
        places = tl.where(higher, start + columns, places)
        peaks = tl.maximum(peaks, z)
    peak = tl.max(peaks, 0)
    # The first column that has the maximum. For a row of NaN still a valid column: the caller looks it up.
    best = tl.min(tl.where(peaks == peak, places, vocab - 1), 0)
    lse = peak + tl.log(tl.sum(totals * tl.exp(peaks - peak), 0))

    # Second reading. q' = exp(t - lse_full) = q * full_share, with full_share = exp(lse_draft - lse_full).
    mix, weight = tl.load(Mix + row), tl.load(Weight + row)
    full_share = tl.exp(lse_draft - lse_full)
    label_dots = tl.zeros([BLOCK], dtype=tl.float32)
    alphas = tl.zeros([BLOCK], dtype=tl.float32)
    below = tl.zeros([BLOCK], dtype=tl.float32)
    for start in tl.range(0, vocab, BLOCK):
        real = start + columns < vocab
        z = tl.load(Logits + start + columns, mask=real, other=float("-inf"))
        t = tl.load(Target + start + columns, mask=real, other=float("-inf"))
        p, q = tl.exp(z - lse), tl.exp(t - lse_draft)
        # The product saves an exponential, but the mask p < q' of other gradients needs q' unrounded.
        q_full = q * full_share if MODE == 0 else tl.exp(t - lse_full)
        label_dots += tl.where(real, q * z, 0.0)
        alphas += tl.minimum(p, q_full)
        if GRADIENT and MODE == 0:
            to = DLogits + row * vocab + start + columns
            tl.store(to, ((p - q) * weight).to(DLogits.dtype.element_ty), mask=real)
        if MODE > 0:
            below += tl.where(p < q_full, p, 0.0)
    alpha = tl.sum(alphas, 0)
    tl.store(CrossEntropy + row, lse - tl.sum(label_dots, 0))
    tl.store(Alpha + row, alpha)
    tl.store(Best + row, best)

    # Third reading, now that sum_v [p < q'] p (below_sum) and alpha are known.
    if GRADIENT and MODE > 0:
        below_sum = tl.sum(below, 0)
        for start in tl.range(0, vocab, BLOCK):
            real = start + columns < vocab
            z = tl.load(Logits + start + columns, mask=real, other=float("-inf"))
            t = tl.load(Target + start + columns, mask=real, other=float("-inf"))
            d = _acceptance_gradient(z, t, lse, lse_draft, lse_full, below_sum, alpha, mix, MODE)
            to = DLogits + row * vocab + start + columns
            tl.store(to, (d * weight).to(DLogits.dtype.element_ty), mask=real)


class TritonKernels(PlainKernels):
    """``PlainKernels`` for float32 logits on a GPU."""

    @staticmethod
    def label_sums(target_logits: Tensor) -> tuple[Tensor, Tensor]:
        """See ``PlainKernels``."""
        rows, vocab = target_logits.shape
        lse, entropy = (torch.empty(rows, dtype=torch.float32, device=target_logits.device) for _ in range(2))
        _label_kernel[(rows,)](target_logits, lse, entropy, vocab, BLOCK, num_warps=WARPS)
        return lse, entropy

    @staticmethod
    def row_losses(
        logits: Tensor, target_logits: Tensor, target_row: Tensor, lse_draft: Tensor, lse_full: Tensor,
        kind: str, mix: Tensor | None, weight: Tensor, d_logits: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See ``PlainKernels``."""
        n, vocab = logits.shape
        cross_entropy, alpha = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(2))
        best = torch.empty(n, dtype=torch.int64, device=logits.device)
        mix = torch.ones(n, dtype=torch.float32, device=logits.device) if mix is None else mix.float()
        _row_kernel[(n,)](
            logits, target_logits, target_row, lse_draft, lse_full, mix, weight.float(), cross_entropy, alpha,
            best, logits if d_logits is None else d_logits, vocab, MODES[kind], d_logits is not None, BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
        return cross_entropy, alpha, best
