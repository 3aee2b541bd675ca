"""Every Ulysses rank gets the KV heads that its query heads read; layouts that cannot work are refused."""

from __future__ import annotations

import pytest

from eagle_ds.sharding.heads import HeadSharding


@pytest.mark.parametrize(("ulysses", "slots"), [(1, 8), (4, 2), (8, 1), (16, 1), (32, 1)])
def test_kv_heads_that_ulysses_does_not_divide_are_replicated(ulysses: int, slots: int) -> None:
    """Llama-3.1-8B has 32 query heads and 8 KV heads."""
    heads = HeadSharding(32, 8, ulysses)
    assert heads.slots == slots
    assert heads.replicates == (ulysses > 8)


@pytest.mark.parametrize("ulysses", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 6, 12])
def test_each_query_head_finds_its_kv_head_in_its_ranks_slots(kv_heads: int, ulysses: int) -> None:
    heads = HeadSharding(12, kv_heads, ulysses)
    assert len(heads.slot_heads) == ulysses * heads.slots
    for head in range(12):
        rank, own = divmod(head, 12 // ulysses)
        slot = rank * heads.slots + own // heads.heads_per_slot
        assert heads.slot_heads[slot] == head // (12 // kv_heads)
    assert sorted(set(heads.slot_heads)) == list(range(kv_heads))


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"ulysses=5 does not divide 12 query heads; use one of \[1, 2, 3, 4, 6, 12\]"
    ):
        HeadSharding(12, 4, 5)
    with pytest.raises(ValueError, match="5 key/value heads do not divide 12 query heads"):
        HeadSharding(12, 5)
