"""Worker processes that start fast and report their death, and results in order from a pool of workers.

Importing torch takes seconds. The fork server is a process that has imported the heavy libraries and does
nothing else. Forking it takes milliseconds, and is safe because it has no threads, no GPU and no open file.
This module imports nothing heavy, so that a tool can start the server before its own imports.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext, ForkServerContext
from typing import Any, TypeVar

Result = TypeVar("Result")

LIBRARIES = ("torch", "h5py", "safetensors.torch")


def fork_server() -> ForkServerContext:
    """Return the context whose processes are forked from the server; the first process starts the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    return context


def start_fork_server() -> None:
    """Start the server now: it loads the libraries on another core while this process loads its own."""
    fork_server()
    forkserver.ensure_running()


class WorkerProcess:
    """A child process that runs ``body(connection, *arguments)`` and exchanges messages over a pipe."""

    def __init__(self, context: BaseContext, body: Callable[..., None], *arguments: object) -> None:
        self.connection, childs_end = context.Pipe()
        self.process = context.Process(target=body, args=(childs_end, *arguments), daemon=True)
        self.process.start()
        # Now only the child holds its end. If it dies, for any reason, the pipe ends and `receive` returns.
        childs_end.close()

    def receive(self) -> Any:
        """Wait for the next message. Raises EOFError once the child has ended; `exit_code` says how."""
        try:
            return self.connection.recv()
        except OSError as error:  # the child was killed while it wrote a message
            raise EOFError(str(error)) from error

    def exit_code(self) -> int | None:
        """Wait for the child to end. The code is -N if signal N killed it."""
        self.process.join()
        return self.process.exitcode

    def stop(self) -> None:
        """End the child, whatever it is doing."""
        self.process.terminate()
        self.process.join()
        self.connection.close()


def in_order(futures: Iterable[Future[Result]], ahead: int) -> Iterator[Result]:
    """Yield the results of ``futures`` in order. Take at most ``ahead`` futures in advance.

    ``futures`` is a generator that submits a task whenever a future is taken from it. So a slow consumer
    stops the submission, which bounds the memory of the tasks in flight.
    """
    pending: deque[Future[Result]] = deque()
    for future in futures:
        pending.append(future)
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def receive_all(workers: Sequence[WorkerProcess]) -> Iterator[Any]:
    """Yield the messages of all workers as they arrive, until every worker has ended.

    Stops the workers at the end, on an error, and when the iterator is closed.

    Raises:
        Exception: a worker sent an exception as its message.
        ChildProcessError: a worker died without sending one.
    """
    running = {worker.connection: worker for worker in workers}
    try:
        while running:
            for connection in wait(list(running)):
                try:
                    message = running[connection].receive()
                except EOFError:
                    if code := running.pop(connection).exit_code():
                        died = f"a worker process died with exit code {code}"
                        raise ChildProcessError(f"{died}; -9 usually means that memory ran out") from None
                    continue
                if isinstance(message, BaseException):
                    raise message
                yield message
    finally:
        for worker in workers:
            worker.stop()
