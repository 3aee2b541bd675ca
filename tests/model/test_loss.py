"""The fused loss does not depend on its chunk size, and its gradients are those of autograd.

The Triton kernels of the GPU give what the plain reference gives.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eagle_ds.kernels.loss import PlainKernels
from eagle_ds.model.loss import LossSettings, head_loss
from tests.layout_cases import TINY, Case
from tests.micro_batch import make_targets, rank_batch, relative_error

CASE = Case((("0" * 9 + "1" * 30 + "000" + "1" * 11,),))


def run(chunk_bytes: int, kind: str = "kl") -> tuple[torch.Tensor, list[torch.Tensor]]:
    batch, head = rank_batch(CASE.sharding(0), 0, CASE.whole(0), "serving"), CASE.head()
    generator = torch.Generator().manual_seed(1)
    rows = batch.target_index.shape[0]
    shapes = [(rows, TINY.hidden_size)] * CASE.steps + [(24,), (19, 24)]
    *states, norm, weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    )
    weights = torch.tensor([0.5, 0.4, 0.3, 0.2], dtype=torch.float64)
    settings = LossSettings(weights, kind, chunk_bytes=chunk_bytes)
    loss, _ = head_loss(states, norm, weight, 1e-5, make_targets(batch, head), settings)
    (3 * loss).backward()
    return loss.detach(), [norm.grad, weight.grad, *(s.grad for s in states)]


@pytest.mark.parametrize("kind", ["kl", "alpha"])
def test_chunk_size_changes_nothing(kind: str) -> None:
    whole_loss, whole = run(1 << 30, kind)
    loss, grads = run(1, kind)  # the least: 16 rows
    assert relative_error(loss, whole_loss) < 1e-13
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(grads, whole, strict=True))


@pytest.mark.parametrize("kind", ["kl", "alpha", "lambda"])
def test_gradient_of_the_row_formula_is_autograds(kind: str) -> None:
    torch.manual_seed(0)
    logits = (2 * torch.randn(6, 13, dtype=torch.float64)).requires_grad_()
    target, row = torch.randn(4, 13, dtype=torch.float64), torch.tensor([0, 1, 1, 3, 2, 0])
    mix, weight = torch.tensor(0.3, dtype=torch.float64), torch.full((6,), 0.7, dtype=torch.float64)
    lse_draft = torch.logsumexp(target, -1)
    lse_full = lse_draft + 0.2
    log_p, q = torch.log_softmax(logits, -1), torch.exp(target - lse_draft[:, None])[row]
    alpha = torch.minimum(log_p.exp(), torch.exp(target - lse_full[:, None])[row]).sum(-1)
    cross = -(q * log_p).sum(-1)
    loss = {"kl": cross, "alpha": -torch.log(alpha), "lambda": mix * cross + (1 - mix) * (1 - alpha)}[kind]
    (expected,) = torch.autograd.grad(0.7 * loss.sum(), logits)
    found = torch.empty_like(expected)
    got = PlainKernels.row_losses(
        logits.detach(), target, row, lse_draft, lse_full, kind, mix.expand(6), weight, found
    )
    assert relative_error(got[0], cross.detach()) < 1e-13 and relative_error(got[1], alpha.detach()) < 1e-13
    assert torch.equal(got[2], logits.argmax(-1)) and relative_error(found, expected) < 1e-13


def test_a_batch_without_counted_rows_has_zero_loss_and_zero_gradients() -> None:
    batch, head = rank_batch(CASE.sharding(0), 0, CASE.whole(0), "serving"), CASE.head()
    targets = make_targets(batch, head)
    targets = replace(targets, counted=torch.zeros_like(targets.counted))
    shape = (len(batch.target_index), 24)
    states = [torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(CASE.steps)]
    weight = torch.randn(19, 24, dtype=torch.float64).requires_grad_()
    norm = torch.ones(24, dtype=torch.float64)
    loss, sums = head_loss(states, norm, weight, 1e-5, targets, LossSettings(torch.ones(CASE.steps)))
    loss.backward()
    assert loss == 0 and not weight.grad.any() and not states[0].grad.any() and not sums["counted"].any()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["kl", "alpha", "lambda"])
@pytest.mark.parametrize("vocab", [32000, 4096, 999])
def test_the_triton_twin_agrees(kind: str, vocab: int) -> None:
    from eagle_ds.kernels.loss_triton import TritonKernels

    torch.manual_seed(0)
    logits, target = (2 * torch.randn(n, vocab, device="cuda") for n in (65, 40))
    row = torch.randint(0, 40, (65,), device="cuda")
    mix, weight = torch.rand(65, device="cuda"), torch.rand(65, device="cuda")
    sums, fused_sums = PlainKernels.label_sums(target), TritonKernels.label_sums(target)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(fused_sums, sums, strict=True))
    plain, fused = (torch.empty(65, vocab, device="cuda") for _ in range(2))
    expected = PlainKernels.row_losses(logits, target, row, sums[0], sums[0] + 0.2, kind, mix, weight, plain)
    found = TritonKernels.row_losses(logits, target, row, sums[0], sums[0] + 0.2, kind, mix, weight, fused)
    assert relative_error(found[0], expected[0]) < 1e-5 and relative_error(found[1], expected[1]) < 1e-5
    assert torch.equal(found[2], expected[2]) and relative_error(fused, plain) < 1e-5
