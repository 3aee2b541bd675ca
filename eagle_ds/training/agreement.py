"""Ranks that agree, or stop together: small control messages over gloo, beside the traffic of the training itself.

A rank that finds an error says so in the next message, so that all ranks raise within a message's time instead of waiting
for one another. Gloo keeps these messages off the GPU's streams.
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
TIMEOUT = timedelta(hours=12)  # others may wait for one that counts a store's tokens; a rank that dies is noticed at once


class RankFailure(ValueError):
    """Some rank could not go on; the message is that rank's, the same on every rank."""


class Agreement:
    """Control messages between all ranks of ``topology``, over ``backend``. Every method is collective."""

    def __init__(self, topology: Topology, backend: str = "gloo") -> None:
        self.topology = topology
        self._group: Any = None
        if topology.world_size > 1:
            self._group = dist.new_group(backend=backend, timeout=TIMEOUT)

    def gather(self, values: Sequence[int]) -> np.ndarray:
        """int64 [world, len(values)], row r being rank r's."""
        own = torch.tensor(values, dtype=torch.int64)
        if self.topology.world_size == 1:
            return own[None].numpy()
        everyone = [torch.empty_like(own) for _ in range(self.topology.world_size)]
        dist.all_gather(everyone, own, group=self._group)
        return torch.stack(everyone).numpy()

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's ``value``, by rank."""
        if self.topology.world_size == 1:
            return [value]
        everyone: list[Any] = [None] * self.topology.world_size
        dist.all_gather_object(everyone, value, group=self._group)
        return everyone

    def together(self, action: Callable[[], Result]) -> Result:
        """Run ``action`` on every rank; if it raised on any, raise RankFailure on all, else return this rank's result."""
        result, error = attempt(action)
        self.raise_together(error)
        assert error is None
        return result  # type: ignore[return-value]

    def first_then_all(self, action: Callable[[], Result]) -> Result:
        """``together``, but rank 0 goes first: for what the others find done once it is through."""
        early = attempt(action) if self.topology.rank == 0 else (None, None)
        self.raise_together(early[1])
        return self.together(action) if self.topology.rank else self.together(lambda: early[0])  # type: ignore[return-value]

    def raise_together(self, error: BaseException | None) -> None:
        """Raise RankFailure everywhere if any rank has an error. One integer where none has."""
        if self.gather([error is not None]).any():
            self.fail(error)

    def fail(self, error: BaseException | None) -> None:
        """All ranks know that some rank has an error: exchange the messages and raise."""
        if error is not None and not isinstance(error, ValueError | OSError):
            logger.error("rank %d failed", self.topology.rank, exc_info=error)
        messages = self.gather_objects(None if error is None else _describe(error))
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        distinct = list(dict.fromkeys(messages[rank] for rank in failed))
        where = "" if len(failed) == len(messages) else f"rank {', '.join(map(str, failed))}: "
        raise RankFailure(where + " | ".join(distinct)) from error

    def same(self, info: dict[str, Any]) -> None:
        """Raise RankFailure on all ranks, naming fact and ranks, unless ``facts`` are equal everywhere."""
        everyone = self.gather_objects(info)
        differing = []
        for name in info:
            values = [theirs[name] for theirs in everyone]
            if any(value != values[0] for value in values):
                differing.append(f"{name} ({'; '.join(f'rank {rank}: {value}' for rank, value in enumerate(values))})")
        if differing:
            raise RankFailure(f"ranks differ in {', '.join(differing)}; give every node the same files and the same command line")

    def check_micro_batch(self, error: BaseException | None, prints: tuple[int, int], what: str, counted: Sequence[int]) -> np.ndarray:
        """Sum over ranks of ``counted``, after making sure that no rank has an error and that all hold the same data.

        ``prints``: hashes that must agree (over all ranks, within one sequence-parallel group); ``what`` describes this
        rank's data in the message. Raises RankFailure on all ranks.
        """
        table = self.gather([error is not None, *prints, *counted])
        if table[:, 0].any():
            self.fail(error)
        plans = table[:, 2].reshape(self.topology.dp, self.topology.sp)
        if (table[:, 1] != table[0, 1]).any() or (plans != plans[:, :1]).any():
            shown = "; ".join(f"rank {rank}: {there}" for rank, there in enumerate(self.gather_objects(what)))
            raise RankFailure(f"ranks hold different data at this step ({shown}); they must read the same store with the same recipe")
        return table[:, 3:].sum(0)


def attempt(action: Callable[[], Result]) -> tuple[Result | None, BaseException | None]:
    """(result, None) or (None, what it raised)."""
    try:
        return action(), None
    except Exception as error:
        return None, error


def _describe(error: BaseException) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
