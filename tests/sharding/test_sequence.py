"""Sharding of a sequence: every row has one owner in every layout, and the work of the ranks balances."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.sequence import Document, shard_sequence

LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2), (4, 2), (2, 4)]
TTT_STEPS = 4
TURNS = tuple((start, start + 512) for start in range(0, 131072, 5120))


@st.composite
def documents(draw: st.DrawFn) -> list[Document]:
    """One to four documents with random trained spans."""
    made = []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(1, 90))
        edge = st.integers(0, length)
        spans = draw(st.lists(st.tuples(edge, edge), max_size=4))
        made.append(Document(length, tuple((min(span), max(span)) for span in spans)))
    return made


@pytest.mark.parametrize(("ulysses", "ring"), LAYOUTS)
@pytest.mark.parametrize("alignment", ["serving", "feature"])
@given(pack=documents())
def test_every_row_has_one_owner(ulysses: int, ring: int, alignment: str, pack: list[Document]) -> None:
    shape = {"ulysses": ulysses, "ring": ring, "ttt_steps": TTT_STEPS, "alignment": alignment}
    sharding = shard_sequence(pack, **shape)
    trained = {
        start + row
        for document, start in zip(pack, sharding.starts, strict=False)
        for row in rg.rows(document.trained_rows(TTT_STEPS, alignment)).tolist()
    }
    owned = [row for share in sharding.context for row in rg.rows(share).tolist()]
    assert sorted(owned) == list(range(sharding.num_tokens))
    queries = [row for share in sharding.queries for row in rg.rows(share).tolist()]
    assert sorted(queries) == sorted(trained)


@pytest.mark.parametrize(("ulysses", "ring"), LAYOUTS)
@given(pack=documents())
def test_a_rank_reads_every_label_of_its_query_rows(ulysses: int, ring: int, pack: list[Document]) -> None:
    sharding = shard_sequence(pack, ulysses=ulysses, ring=ring, ttt_steps=TTT_STEPS)
    for rank in range(sharding.world):
        expected = set()
        for start, stop in sharding.document_bounds():
            for row in rg.rows(rg.clip(sharding.queries[rank], start, stop)).tolist():
                expected |= {row + 1 + k for k in range(TTT_STEPS) if row + 1 + k < stop}
        assert set(rg.rows(sharding.target_rows(rank)).tolist()) == expected


@pytest.mark.parametrize(("ulysses", "ring"), LAYOUTS)
def test_the_shares_of_a_ring_rank_are_its_rows_in_order(ulysses: int, ring: int) -> None:
    sharding = shard_sequence([Document(5000, ((100, 2000), (3000, 4800)))], ulysses=ulysses, ring=ring)
    for ring_rank in range(ring):
        for rows in (sharding.ring_context(ring_rank), sharding.ring_queries(ring_rank)):
            numbers = rg.rows(rows).tolist()
            assert numbers == sorted(numbers)


@pytest.mark.parametrize("ring", [2, 4, 8])
@pytest.mark.parametrize("spans", [((0, 131072),), ((118000, 131072),), TURNS], ids=["all", "end", "turns"])
def test_answers_anywhere_load_all_ranks_alike(ring: int, spans: rg.Ranges) -> None:
    balance = shard_sequence([Document(131072, spans)], ulysses=2, ring=ring).balance
    assert max(balance.values()) < 1.03, balance


def test_equal_documents_have_equal_digests_and_others_do_not() -> None:
    def digest(spans: rg.Ranges, **layout: int) -> str:
        return shard_sequence([Document(700, spans)], **layout).digest

    assert digest(((5, 600),)) == digest(((5, 300), (300, 600)))
    assert len({digest(((5, 600),)), digest(((5, 601),)), digest(((5, 600),), ulysses=2)}) == 3


@pytest.mark.parametrize(
    ("length", "spans", "said"), [(0, (), "at least 1"), (9, ((3, 11),), "outside the sample")]
)
def test_impossible_documents_are_refused(length: int, spans: rg.Ranges, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Document(length, spans)
