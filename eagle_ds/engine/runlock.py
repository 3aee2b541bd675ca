"""One run at a time in a folder: a launcher that is killed can leave its ranks at work, and the same command starts again."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from eagle_ds.engine.world import World

logger = logging.getLogger(__name__)

LOCK = ".lock"


@contextlib.contextmanager
def only_run_in(run_dir: Path, world: World) -> Iterator[None]:
    """Keep other runs out of ``run_dir`` meanwhile; the kernel lets them in again however this process ends. Collective.

    Raises RankFailure (a ValueError) on all ranks where another run is at work.
    """
    lock = world.agreement.together(lambda: _take(run_dir) if world.is_first else None)
    try:
        yield
    finally:
        if lock:
            lock.close()


def _take(run_dir: Path) -> TextIO:
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise ValueError(
            f"another run is at work in {run_dir} ({owner or 'it has not said who it is'}); it may have outlived its launcher. "
            "End it with SIGTERM, which saves, and run again to resume; or give this one another --name"
        ) from error
    except OSError as error:
        logger.warning("%s cannot be locked (%s): see to it yourself that no other run writes there", run_dir, error)
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
