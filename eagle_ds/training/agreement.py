"""Keep all ranks together: they agree on values, or all raise the same error.

A rank that fails alone leaves the others waiting in their next collective until a timeout, often hours later.
So a rank with an error does not raise at once. It reports the error in the next control message, which all
ranks exchange at fixed points, and then all ranks raise the same `RankFailure`.

Control messages go over gloo, next to the NCCL traffic of the training itself, for two reasons. Gloo runs on
the CPU, so a message does not wait for the kernels queued on the GPU's stream, and the host does not wait for
the GPU. And the values are on the host already: NCCL would need a copy to the device and one back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from eagle_ds.parallel.topology import Topology

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Long, because ranks wait here while rank 0 downloads a target or counts the tokens of a large store. The
# death of a rank needs no timeout: its connections close, and gloo raises on the others at once.
TIMEOUT = timedelta(hours=12)


class RankFailure(ValueError):
    """At least one rank has an error. The message is that rank's, and the same on every rank."""


class Agreement:
    """Control messages between all ranks of ``topology``. Every method is collective."""

    def __init__(self, topology: Topology, backend: str = "gloo") -> None:
        self.topology = topology
        self._group: Any = None
        if topology.world_size > 1:
            self._group = dist.new_group(backend=backend, timeout=TIMEOUT)

    def gather(self, values: Sequence[int]) -> np.ndarray:
        """Return the values of all ranks, int64 [world, len(values)]; row r is rank r's."""
        own = torch.tensor(values, dtype=torch.int64)
        if self.topology.world_size == 1:
            return own[None].numpy()
        everyone = [torch.empty_like(own) for _ in range(self.topology.world_size)]
        dist.all_gather(everyone, own, group=self._group)
        return torch.stack(everyone).numpy()

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's ``value``, in the order of ranks. Pickles, so it is slower than `gather`."""
        if self.topology.world_size == 1:
            return [value]
        everyone: list[Any] = [None] * self.topology.world_size
        dist.all_gather_object(everyone, value, group=self._group)
        return everyone

    def together(self, action: Callable[[], Result]) -> Result:
        """Run ``action`` on every rank. Returns its result, or raises RankFailure on all if it raised on any.

        ``action`` must not be collective itself: where it raises, the other ranks would wait for this one
        inside it.
        """
        result, error = attempt(action)
        self.raise_together(error)
        assert error is None
        return result  # type: ignore[return-value]

    def first_then_all(self, action: Callable[[], Result]) -> Result:
        """Run ``action`` on rank 0, then on the others, which find what rank 0 has made."""
        early = attempt(action) if self.topology.rank == 0 else (None, None)
        self.raise_together(early[1])
        return self.together(action if self.topology.rank else lambda: early[0])  # type: ignore[return-value]

    def raise_together(self, error: BaseException | None) -> None:
        """Raise RankFailure on all ranks if any has an error. Costs one integer per rank if none has."""
        if self.gather([error is not None]).any():
            self.fail(error)

    def fail(self, error: BaseException | None) -> None:
        """Exchange the error texts and raise. Call it once all ranks know that at least one has an error."""
        if error is not None and not isinstance(error, ValueError | OSError):
            # Probably a bug and not the user's mistake, so log the traceback.
            logger.error("rank %d failed", self.topology.rank, exc_info=error)
        messages = self.gather_objects(None if error is None else _describe(error))
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        distinct = list(dict.fromkeys(messages[rank] for rank in failed))
        # Name the ranks that have an error, unless all have one.
        where = "" if len(failed) == len(messages) else f"rank {', '.join(map(str, failed))}: "
        raise RankFailure(where + " | ".join(distinct)) from error

    def same(self, info: dict[str, Any]) -> None:
        """Raise RankFailure on all ranks, naming what differs, unless ``info`` is equal everywhere."""
        everyone = self.gather_objects(info)
        differing = []
        for name in info:
            values = [theirs[name] for theirs in everyone]
            if any(value != values[0] for value in values):
                shown = "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
                differing.append(f"{name} ({shown})")
        if differing:
            remedy = "give every node the same files and the same command line"
            raise RankFailure(f"ranks differ in {', '.join(differing)}; {remedy}")

    def check_micro_batch(
        self, error: BaseException | None, prints: tuple[int, int], what: str, counted: Sequence[int]
    ) -> np.ndarray:
        """Check that no rank has an error and that all hold the same data, and sum counts over ranks.

        One message does all three, because it is sent before every micro-batch.

        Args:
            error: what this rank's reading raised, None if it has its data.
            prints: hashes that must agree: the first over all ranks, the second within a sequence-parallel
                group.
            what: description of this rank's data, for the error message.
            counted: counts to add up over ranks.

        Returns:
            int64 [len(counted)], the sums.

        Raises:
            RankFailure: on all ranks.
        """
        table = self.gather([error is not None, *prints, *counted])
        if table[:, 0].any():
            self.fail(error)
        # Ranks of one sequence-parallel group are neighbours: row g of this [dp, sp] table is one group.
        groups = table[:, 2].reshape(self.topology.dp, self.topology.sp)
        if (table[:, 1] != table[0, 1]).any() or (groups != groups[:, :1]).any():
            everyone = self.gather_objects(what)
            shown = "; ".join(f"rank {rank}: {theirs}" for rank, theirs in enumerate(everyone))
            remedy = "they must read the same store with the same recipe"
            raise RankFailure(f"ranks hold different data at this step ({shown}); {remedy}")
        return table[:, 3:].sum(0)


def attempt(action: Callable[[], Result]) -> tuple[Result | None, BaseException | None]:
    """Run ``action``. Returns (its result, None), or (None, what it raised)."""
    try:
        return action(), None
    except Exception as error:
        return None, error


def _describe(error: BaseException) -> str:
    """Return the text of an error. Other errors than ValueError need their type to be understood."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
