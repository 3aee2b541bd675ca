"""One run at a time in a folder: a launcher that is killed can leave its ranks at work, and the same command starts again."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from eagle_ds.config.outputs import InUse, hold

if TYPE_CHECKING:
    from eagle_ds.training.world import World

logger = logging.getLogger(__name__)

LOCK = ".lock"


@contextlib.contextmanager
def only_run_in(run_dir: Path, world: World) -> Iterator[None]:
    """Keep other runs out of ``run_dir`` meanwhile. Collective. Raises RankFailure on all ranks as ``take_run`` does on one."""
    lock = world.agreement.together(lambda: take_run(run_dir) if world.is_first else None)
    try:
        yield
    finally:
        if lock:
            lock.close()


def take_run(run_dir: Path) -> TextIO | None:
    """Lock the folder, made if need be; None, with a warning, where its file system knows no locks.

    Raises ValueError where another run is at work."""
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        file = hold(run_dir / LOCK)
    except InUse as owner:
        raise ValueError(
            f"another run is at work in {run_dir} ({str(owner) or 'it has not said who it is'}); it may have outlived its launcher. "
            "End it with SIGTERM, which saves, and run again to resume; or give this one another --name"
        ) from owner
    except OSError as error:
        logger.warning("%s cannot be locked (%s): see to it yourself that no other run writes there", run_dir, error)
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
