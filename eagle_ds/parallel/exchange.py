"""All communication of the prefix attention of one sequence, on one rank: Ulysses within the ring rank, then
the ring.

The model gets a `SequenceExchange` and calls it. It knows neither process groups nor who owns which rows.

    K_0/V_0  [own context rows, Hkv, d]  --Ulysses-->  [ring rank's rows, slots, d]  --ring-->  [S, slots, d]
    q        [own query rows, Hq, d]     --Ulysses-->  [ring rank's query rows, Hq/U, d]

With rotation K_0/V_0 are not gathered; `RingExchange.rotate` sends the blocks around in every TTT step.
"""

from __future__ import annotations

from torch import Tensor

from eagle_ds.parallel.ring import RingExchange
from eagle_ds.parallel.topology import ProcessGroups
from eagle_ds.parallel.ulysses import UlyssesExchange
from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.heads import HeadSharding
from eagle_ds.sharding.sequence import SequenceSharding


class SequenceExchange:
    """Exchange rows, heads and blocks of one sequence.

    Every method is collective over the sequence-parallel group.
    """

    def __init__(
        self, sharding: SequenceSharding, groups: ProcessGroups, query_heads: int, kv_heads: int
    ) -> None:
        self.sharding = sharding
        heads = HeadSharding(query_heads, kv_heads, sharding.ulysses)
        self.ulysses = UlyssesExchange(groups.ulysses, heads)
        self.ring = RingExchange(groups.ring, [sharding.ring_context(r) for r in range(sharding.ring)])
        self.rotates = sharding.ring > 1 and sharding.ring_mode == "p2p"
        # Row counts of the ranks of the own Ulysses group, which are consecutive in the sharding.
        first = groups.ring.rank * sharding.ulysses
        own = slice(first, first + sharding.ulysses)
        self.context_counts = [rg.count(r) for r in sharding.context[own]]
        self.query_counts = [rg.count(r) for r in sharding.queries[own]]
        # int64, the rows of the sequence that the ring rank's queries belong to.
        self.query_rows = rg.rows(sharding.ring_queries(groups.ring.rank))

    def queries_to_heads(self, rows: Tensor) -> Tensor:
        """Exchange [own query rows, Hq, w] -> [query rows of the ring rank, Hq / U, w]."""
        return self.ulysses.to_heads(rows, self.query_counts)

    def heads_to_queries(self, rows: Tensor) -> Tensor:
        """Exchange [query rows of the ring rank, Hq / U, w] -> [own query rows, Hq, w]."""
        return self.ulysses.to_rows(rows, self.query_counts)

    def share_keys(self, kv: Tensor) -> Tensor:
        """Send K_0/V_0 [own context rows, Hkv, 2d] to all ranks that need them.

        Returns [S, slots, 2d], this rank's slots. With rotation the rows are those of the ring rank's block.
        """
        kv = self.ulysses.kv_to_slots(kv, self.context_counts)
        return kv if self.rotates else self.ring.gather(kv)

    def return_gradients(self, dkv: Tensor) -> Tensor:
        """Sum dK_0/dV_0 over all ranks, and return those of the own rows: the transpose of ``share_keys``.

        With rotation the ring has summed them already, one hop after another.
        """
        dkv = dkv if self.rotates else self.ring.scatter_sum(dkv)
        return self.ulysses.slots_to_kv(dkv, self.context_counts)
