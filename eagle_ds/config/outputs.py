"""Check output paths before long work starts, and lock files so that one process at a time writes."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

PICTURES = (".png", ".svg", ".pdf")


class InUse(Exception):
    """Another process holds the lock. The message is the content of the lock file."""


def hold(path: Path) -> TextIO:
    """Create the file ``path`` if necessary and lock it.

    Returns:
        The open file. The lock is released when it is closed or this process ends.

    Raises:
        InUse: another process holds the lock.
        OSError: the file system does not support locks.
    """
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        if isinstance(error, BlockingIOError):
            raise InUse(owner) from error
        raise
    return file


def check_output_folder(folder: Path, setting: str) -> None:
    """Raise ValueError unless ``folder`` exists or can be created, and is writable. Creates nothing.

    ``setting``: the option that named the folder, as the user typed it.
    """
    _check(folder, f"{setting} {folder}")


def _check(folder: Path, named: str) -> None:
    # The nearest ancestor that exists is where the missing folders would be created.
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not existing.is_dir():
        wrong = f"{named}: {existing} is a file, where a folder was expected"
        raise ValueError(f"{wrong}; give another path, or remove the file")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        wrong = f"{named}: nothing can be written in {existing} ({error.strerror or error})"
        raise ValueError(f"{wrong}; give a path in a folder where you may write") from error


def check_output_file(path: Path, setting: str, endings: Sequence[str] = ()) -> None:
    """Raise ValueError unless the file ``path`` can be written and has one of ``endings``, if given.

    Creates nothing.
    """
    if endings and path.suffix not in endings:
        known = f"{', '.join(endings[:-1])} or {endings[-1]}"
        raise ValueError(f"{setting} {path}: the name of a picture ends with {known}")
    if path.is_dir():
        raise ValueError(f"{setting} {path}: this is a folder, where a file was expected; name a file in it")
    _check(path.parent, f"{setting} {path}")
    if path.exists() and not os.access(path, os.W_OK):
        wrong = f"{setting} {path}: no permission to write this file"
        raise ValueError(f"{wrong}; give another name, or make it writable")
