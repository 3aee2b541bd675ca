"""Run a server as a child process: wait until it answers, pass signals on, show its log when it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_S = 0.25
PROBE_TIMEOUT_S = 5.0
REPORT_S = 10.0  # between two lines of progress
STOP_S = 30.0  # from the signal to SIGKILL
LAST_LINES = 40

Report = Callable[[str], None]


class ServerDied(Exception):
    """The server ended by itself, or did not become ready. The message holds the last lines of its log."""


class ServerProcess:
    """A server and its own child processes, in a process group of their own.

    Engines start several processes. A signal goes to all of them.
    """

    child: subprocess.Popen

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command, self.log = command, log
        self.received: int | None = None  # first signal that this process got

    @property
    def ended(self) -> bool:
        """Whether the server has ended or was asked to."""
        return self.received is not None or self.child.poll() is not None

    @classmethod
    @contextmanager
    def running(cls, command: Sequence[str], log: Path) -> Iterator[ServerProcess]:
        """Start a server, pass signals on to it, and end it when the block ends."""
        server = cls(command, log)
        # Handlers come first, so that no signal ends this process and leaves the server behind.
        before = {number: signal.signal(number, server._forward) for number in SIGNALS}
        try:
            with log.open("wb") as output:
                server.child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            if server.received is not None:
                server.send(server.received)
            try:
                yield server
            finally:
                server.stop()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        # A second signal ends a server that does not react to the first.
        if hasattr(self, "child"):
            self.send(number if self.received is None else signal.SIGKILL)
        self.received = self.received or number

    def send(self, number: int) -> None:
        """Send a signal to all processes of the server."""
        with suppress(ProcessLookupError):  # none is left
            os.killpg(self.child.pid, number)

    def stop(self) -> None:
        """End all processes of the server: by SIGTERM, after 30 seconds by SIGKILL."""
        self.send(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.child.wait(STOP_S)
        self.send(signal.SIGKILL)  # also to processes that outlived the server
        self.child.wait()

    def wait_until_ready(self, health_url: str, limit_s: float, report: Report) -> float | None:
        """Wait until ``health_url`` answers; return the seconds it took, or None if a signal ended the wait.

        ``report`` gets a line every ten seconds, with the last line of the log.

        Raises:
            ServerDied: the server ended, or did not answer within ``limit_s``.
        """
        began = reported = time.monotonic()
        while not self.ended:
            if _answers(health_url):
                return time.monotonic() - began
            now = time.monotonic()
            if now - began > limit_s:
                raise ServerDied(self._message(f"the server was not ready after {limit_s:.0f} s"))
            if now - reported >= REPORT_S:
                reported = now
                report(f"starting, {now - began:.0f} s: {''.join(self.last_lines(1))[:160]}")
            time.sleep(POLL_S)
        if self.received is None:
            raise ServerDied(self._message(f"the server ended with exit code {self.child.returncode}"))
        return None

    def wait(self) -> int:
        """Wait until the server ends; return this process's exit code after a signal.

        Raises ServerDied if the server ended by itself.
        """
        while not self.ended:
            time.sleep(POLL_S)
        if self.received is None:
            raise ServerDied(self._message(f"the server ended with exit code {self.child.returncode}"))
        return 128 + self.received

    def last_lines(self, count: int) -> list[str]:
        """Return the last lines of the log that are not blank."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return [line for line in text.splitlines() if line.strip()][-count:]

    def _message(self, reason: str) -> str:
        lines = "\n".join(f"  {line}" for line in self.last_lines(LAST_LINES)) or "  (nothing)"
        return f"{reason}; the last lines of {self.log}:\n{lines}"


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=PROBE_TIMEOUT_S) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError, HTTPException):
        return False


def health_url(host: str, port: int) -> str:
    """Return the address that both engines answer once they can serve."""
    reachable = "127.0.0.1" if host in ("0.0.0.0", "") else host
    return f"http://{reachable}:{port}/health"
