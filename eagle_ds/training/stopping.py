"""SIGTERM as a request to save and leave: what a scheduler sends a job before it takes the machine away.

The signal sets a flag; the training loop asks all ranks for it at every step boundary, so that they save the same step
together. DeepSpeed's launcher sends the same signal to the other ranks once one has died; then there is nobody left to agree
with, and a rank that waits for the dead one inside a collective would not even see the signal. So a thread is woken by the
interpreter's wakeup descriptor, which works while the main thread is held up, and ends the process if a peer is gone.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import NoReturn

from eagle_ds.training.agreement import Agreement

logger = logging.getLogger(__name__)

EXIT_CODE = 128 + signal.SIGTERM
"""What a process that SIGTERM ended is expected to return: the run is not complete."""


class StopRequest:
    """While open, SIGTERM sets ``received`` instead of ending the process. Open it in the main thread; elsewhere it does nothing.

    ``peers``: process ids on this host without which no agreement is possible.
    """

    def __init__(self, peers: Sequence[int] = ()) -> None:
        self.received = False
        self._peers = [pid for pid in peers if pid != os.getpid() and _is_alive(pid)]
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> StopRequest:
        if self._active:
            self._wakes, self._woken = socket.socketpair()
            self._wakes.setblocking(False)
            self._previous = signal.signal(signal.SIGTERM, self._receive)
            self._previous_fd = signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._active:
            signal.set_wakeup_fd(self._previous_fd)
            signal.signal(signal.SIGTERM, self._previous)
            self._wakes.close()
            self._thread.join()
            self._woken.close()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def _watch(self) -> None:
        """A byte for every signal until the other end is closed."""
        while received := self._woken.recv(1):
            if received[0] == signal.SIGTERM and not all(map(_is_alive, self._peers)):
                logger.error("SIGTERM after another rank has gone: leaving without a checkpoint")
                os._exit(EXIT_CODE)


def leave_at_once(message: str, code: int) -> NoReturn:
    """Say ``message`` and end this process alone. What other ranks have to answer first, as the end of an NCCL group may, is not
    waited for: they are in a collective of their own until the launcher ends them."""
    sys.stdout.flush()
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
    os._exit(code)


def peers_on_this_host(agreement: Agreement) -> list[int]:
    """Process ids of all ranks that run on this host. Collective."""
    here = socket.gethostname()
    return [pid for host, pid in agreement.gather_objects((here, os.getpid())) if host == here]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
