"""Offload changes only where activations are: results are equal, and each storage is moved once.

Storages are back on the device before the backward needs them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from eagle_ds.model import draft
from eagle_ds.model.loss import LossSettings, head_loss
from eagle_ds.model.offload import ActivationOffload, Stored, View
from eagle_ds.sharding import tiles
from tests.layout_cases import TINY, Case
from tests.micro_batch import gradients, kept_bytes, make_targets, prefix_for, rank_batch

CPU = torch.device("cpu")
CASE = Case((("0" * 9 + "1" * 30 + "000" + "1" * 11,),))
VARIANTS = {
    "plain": TINY,
    "normed": replace(TINY, norm_output=True, fc_norm=True),
    "window": replace(TINY, sliding_window=7),
    "residual and heads normed": replace(TINY, norm_before_residual=True, qk_norm=True),
}


def forward(
    case: Case, recompute: str, offload: ActivationOffload | None
) -> tuple[draft.Eagle3Draft, Tensor]:
    model, batch, head = case.model(), rank_batch(case.sharding(0), 0, case.whole(0), "serving"), case.head()
    targets, settings = make_targets(batch, head), LossSettings(torch.ones(case.steps, dtype=torch.float64))
    prefix = prefix_for(model, batch.sharding)
    loss, _ = model(batch, prefix, lambda *states: head_loss(*states, targets, settings), recompute, offload)
    return model, loss


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_ROWS", 7)  # several views of one state


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
@pytest.mark.parametrize("slab_bytes", [1000, 1 << 20])
def test_loss_and_gradients_are_the_same_bit_for_bit(recompute: str, variant: str, slab_bytes: int) -> None:
    case = replace(CASE, arch=VARIANTS[variant])
    model, loss = forward(case, recompute, None)
    loss.backward()
    offload = ActivationOffload(CPU, min_bytes=0, slab_bytes=slab_bytes)
    for _ in range(2):  # the second time the slabs still hold the first's data
        other, same = forward(case, recompute, offload)
        assert kept_bytes(offload) > 0
        same.backward()
        assert torch.equal(same, loss)
        expected, found = gradients(model), gradients(other)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.usefixtures("small_tiles")
def test_a_full_recomputation_moves_states_queries_and_outputs_each_once() -> None:
    """Exactly those: no parameter, no row of the batch, no diagonal key, no view a second time."""
    offload = ActivationOffload(CPU, min_bytes=0)
    _, loss = forward(CASE, "full", offload)
    sharding, arch, steps = CASE.sharding(0), CASE.arch, CASE.steps
    n, s, d, heads = sharding.num_queries, sharding.num_tokens, arch.hidden_size, arch.num_attention_heads
    # fused states, g_0, and g_k up to the one that the last step starts from
    states = (s + n + (steps - 1) * n) * d
    attention = steps * n * (2 * heads * arch.head_dim + heads)
    assert kept_bytes(offload) == 8 * (states + attention)
    loss.backward()


@pytest.mark.parametrize("by", ["backward", "dropping the graph"])
def test_all_slabs_are_free_afterwards(by: str) -> None:
    offload = ActivationOffload(CPU, min_bytes=0, slab_bytes=512)
    for _ in range(3):
        _, loss = forward(CASE, "mlp", offload)
        if by == "backward":
            loss.backward()
        made = offload.slabs.made
        del loss
        assert kept_bytes(offload) == 0 and len(offload.slabs._free) == made
    assert made == offload.slabs.made  # the third forward needed no memory that the first had not


def test_small_storages_integers_and_parameters_stay() -> None:
    offload, w = ActivationOffload(CPU, min_bytes=1024), torch.nn.Parameter(torch.ones(64, 64))
    x, index = torch.ones(64, 64, requires_grad=True) * 1, torch.arange(1000)
    small = torch.ones(8, requires_grad=True) * 1
    with offload.saving():
        y = (x @ w.t())[index % 64].sum() + small.exp().sum()
    assert kept_bytes(offload) == 64 * 64 * 4  # x alone
    y.backward()
    assert torch.equal(w.grad, torch.full_like(w, w.grad[0, 0]))


def test_data_saved_before_an_in_place_change_comes_back_unchanged() -> None:
    offload, w = ActivationOffload(CPU, min_bytes=0), torch.tensor([2.0], requires_grad=True)
    x = torch.ones(300)
    with offload.saving():
        first = (x * w).sum()
        x.add_(1)
        second = (x * w).sum()
    (first + second).backward()
    assert float(w.grad) == 300 * 1 + 300 * 2


class Watched(ActivationOffload):
    """Records for each storage, as the backward asks for it, whether it had been fetched by then."""

    def __init__(self) -> None:
        super().__init__(CPU, min_bytes=0)
        self.asked: list[bool] = []

    def _unpack(self, packed: Tensor | View) -> Tensor:
        if isinstance(packed, View):
            self.asked.append(packed.stored.data is not None)
        return super()._unpack(packed)


@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
def test_every_storage_but_the_first_is_fetched_before_it_is_asked_for(recompute: str) -> None:
    offload = Watched()
    forward(CASE, recompute, offload)[1].backward()
    assert not offload.asked[0] and sum(not ahead for ahead in offload.asked) == 1, offload.asked


def test_a_storage_that_is_fetched_and_never_read_is_released() -> None:
    offload, w = ActivationOffload(CPU, min_bytes=0), torch.ones(300, requires_grad=True)
    with offload.saving():
        first = (w * torch.ones(300)).exp()
        second = first.exp().sum()
    taken = offload.slabs.made
    del first
    second.backward()
    del second
    assert kept_bytes(offload) == 0 and len(offload.slabs._free) == taken


def test_a_new_storage_at_the_address_of_a_freed_one_is_not_mistaken_for_it() -> None:
    """Memory that is freed after it was moved is soon reused for another tensor."""
    offload, w = ActivationOffload(CPU, min_bytes=0), torch.ones(1, requires_grad=True)
    with offload.saving():
        total = sum((torch.full((1000,), float(n)) * w).sum() for n in range(20))
    assert kept_bytes(offload) == 20 * 4000
    total.backward()
    assert float(w.grad) == 1000 * sum(range(20))


def test_slabs_are_free_again_when_autograd_drops_the_view() -> None:
    offload = ActivationOffload(CPU, min_bytes=0)
    packed = offload._pack(torch.ones(500))
    assert isinstance(packed, View) and isinstance(packed.stored, Stored) and not offload.slabs._free
    del packed
    assert len(offload.slabs._free) == 1
