"""Who owns which attention heads within a Ulysses group. Integers only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class HeadSharding:
    """Split Hq query heads into U equal runs, and give each rank the KV heads that its run reads.

    With grouped-query attention, query head h reads KV head h // (Hq / Hkv). A run of Hq / U query heads may
    start or end inside such a group. g = gcd(Hq / U, Hq / Hkv) consecutive query heads always share one KV
    head, so each rank gets Hq / (U * g) KV *slots*, each serving g query heads. Where U divides Hkv the slots
    are the rank's KV heads; otherwise some KV heads are replicated on several ranks. Example, Hq = 8 and Hkv
    = 2:

        U = 2   g = 4   slots of rank 0: KV head 0      of rank 1: KV head 1
        U = 4   g = 2   slots of ranks 0 and 1: KV head 0, a copy each      of ranks 2 and 3: KV head 1

    Raises ValueError if U does not divide Hq or Hkv does not divide Hq.
    """

    query_heads: int
    kv_heads: int
    ulysses: int = 1

    def __post_init__(self) -> None:
        if self.query_heads % self.ulysses:
            works = [u for u in range(1, self.query_heads + 1) if self.query_heads % u == 0]
            raise ValueError(
                f"ulysses={self.ulysses} does not divide {self.query_heads} query heads; "
                f"use one of {works}, or raise ring"
            )
        if self.query_heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} key/value heads do not divide {self.query_heads} query heads")

    @cached_property
    def heads_per_slot(self) -> int:
        """Query heads that one KV slot serves, g."""
        return math.gcd(self.query_heads // self.ulysses, self.query_heads // self.kv_heads)

    @property
    def slots(self) -> int:
        """KV slots of each rank."""
        return self.query_heads // self.ulysses // self.heads_per_slot

    @cached_property
    def slot_heads(self) -> list[int]:
        """The KV head in each slot, for all ranks in order; length U * slots."""
        group = self.query_heads // self.kv_heads
        return [head // group for head in range(0, self.query_heads, self.heads_per_slot)]

    @property
    def replicates(self) -> bool:
        """Whether some KV head is in more than one slot."""
        return len(self.slot_heads) > self.kv_heads
