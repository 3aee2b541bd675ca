"""Stop on SIGTERM, which schedulers send before they take the machine: save at the next step and exit.

The signal only sets a flag. At every step the training loop asks all ranks whether one has received it, so
they save the same step together and all leave.

DeepSpeed's launcher sends SIGTERM too, to the remaining ranks when one has died. Then no agreement is
possible any more. A rank that waits in a collective for the dead one would not even see the signal: Python
runs signal handlers in the main thread, between two bytecodes, and the main thread is inside C code. The
interpreter's wakeup descriptor is written by the C-level handler in any case. A thread reads it, and ends the
process if another rank on this host is gone.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from eagle_ds.training.agreement import Agreement

logger = logging.getLogger(__name__)

# The exit code that shells and schedulers expect of a process ended by SIGTERM. Not 0: the run is not
# complete.
EXIT_CODE = 128 + signal.SIGTERM


class StopRequest:
    """While open, SIGTERM sets ``received`` instead of ending the process.

    Use as a context manager in the main thread; Python allows signal handlers nowhere else, and in other
    threads this does nothing.

    Args:
        peers: process ids on this host. If one is gone when SIGTERM arrives, no checkpoint can be written any
            more and the process ends at once.
    """

    def __init__(self, peers: Sequence[int] = ()) -> None:
        self.received = False
        self._peers = [pid for pid in peers if pid != os.getpid() and _is_alive(pid)]
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> StopRequest:
        if self._active:
            self._write_end, self._read_end = socket.socketpair()
            self._write_end.setblocking(False)  # required by set_wakeup_fd
            self._previous = signal.signal(signal.SIGTERM, self._receive)
            self._previous_fd = signal.set_wakeup_fd(self._write_end.fileno(), warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            signal.set_wakeup_fd(self._previous_fd)
            signal.signal(signal.SIGTERM, self._previous)
            self._write_end.close()  # ends the thread: its recv returns nothing
            self._thread.join()
            self._read_end.close()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def _watch(self) -> None:
        """Read one byte, the signal's number, for every signal, until the write end is closed."""
        while received := self._read_end.recv(1):
            if received[0] == signal.SIGTERM and not all(map(_is_alive, self._peers)):
                logger.error("SIGTERM after another rank has gone: leaving without a checkpoint")
                os._exit(EXIT_CODE)


def leave_at_once(message: str, code: int) -> NoReturn:
    """Print ``message`` and exit without any cleanup.

    Cleanup can wait for other ranks: the end of an NCCL group may, for instance. They are waiting for this
    rank in another collective, so both would hang. Once this process is gone, the launcher ends the others.
    """
    sys.stdout.flush()
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
    os._exit(code)


def peers_on_this_host(agreement: Agreement) -> list[int]:
    """Return the process ids of all ranks that run on this host. Collective."""
    here = socket.gethostname()
    return [pid for host, pid in agreement.gather_objects((here, os.getpid())) if host == here]


def _is_alive(pid: int) -> bool:
    """Whether a process exists. Signal 0 only checks, and is sent to nobody."""
    try:
        os.kill(pid, 0)
    except OSError as error:  # a PermissionError means that it exists and belongs to another user
        return isinstance(error, PermissionError)
    return True
