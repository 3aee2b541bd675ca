"""A pool of processes, connected by gloo unless told otherwise, that runs many test cases.

Starting a process takes seconds, a case milliseconds.

``run(function, world, *args)`` calls ``function(rank, world, *args)`` on the first ``world`` processes, each
in a process group of exactly that size, and returns their results. Exceptions are raised here, with their
tracebacks.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_S = 600  # for one job; only a hang takes this long


def _serve(rank: int, pipe: Connection, backend: str, device: str) -> None:
    os.environ.update(DS_ACCELERATOR=device, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    import deepspeed.ops
    import torch
    import torch.distributed as torch_dist
    from deepspeed import comm

    from eagle_ds.bench.process_groups import register_staged

    register_staged()
    # Without this DeepSpeed compiles for a minute an op that nothing here calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    while (job := pipe.recv()) is not None:
        function, world, store, args = job
        try:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world)
            )
            if world > 1:
                torch_dist.init_process_group(
                    backend, init_method=f"file://{store}", rank=rank, world_size=world
                )
                comm.init_distributed(backend, dist_init_required=False, verbose=False)
                # A rank that fails at once must not close a connection that another rank is still opening.
                torch_dist.barrier()
            pipe.send((True, function(rank, world, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            if torch_dist.is_initialized():
                comm.destroy_process_group()


class GlooPool:
    """``size`` processes that wait for jobs; use it as a context manager.

    On ``device`` "cuda" rank r has GPU r modulo the number of GPUs. The nccl backend needs a GPU for
    each process; with the staged backend several processes share one.
    """

    def __init__(self, size: int, backend: str = "gloo", device: str = "cpu") -> None:
        context = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
        if device == "cpu":
            context.set_forkserver_preload(["tests.gloo_preload"])
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs, backend, device), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        self._folder = tempfile.TemporaryDirectory()
        self._jobs = 0

    def run(self, function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
        """Return the results of ranks 0 .. world - 1."""
        self._jobs += 1
        for pipe in self._pipes[:world]:
            pipe.send((function, world, f"{self._folder.name}/{self._jobs}", args))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes[:world]):
            if not pipe.poll(TIMEOUT_S):
                failures.append(f"rank {rank} did not answer in {TIMEOUT_S} s")
                continue
            good, value = pipe.recv()
            (results if good else failures).append(value)
        if failures:
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send(None)
            process.join(5)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()

    def __enter__(self) -> GlooPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def free_port() -> int:
    """Return a TCP port that is free at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
