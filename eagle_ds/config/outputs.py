"""Where results are to be written, looked at before the work that makes them, and kept to one process at a time."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

PICTURES = (".png", ".svg", ".pdf")


class InUse(Exception):
    """Another process holds the lock; the message is what stands in the file."""


def hold(path: Path) -> TextIO:
    """Lock the file ``path``, made if need be, until what is returned is closed or this process ends, however it ends.

    Raises InUse where another process holds it, and OSError where the file system knows no locks."""
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
    """Raise ValueError unless ``folder`` is one, or can be made, and files can be written there. Leaves nothing behind.

    ``setting``: the option or argument that named it, as the user typed it.
    """
    _check(folder, f"{setting} {folder}")


def _check(folder: Path, named: str) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        raise ValueError(f"{named}: {there} is a file, where a folder was expected; give another path, or remove the file")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"{named}: nothing can be written in {there} ({error.strerror or error}); give a path below a folder that takes "
            "files from you"
        ) from error


def check_output_file(path: Path, setting: str, endings: Sequence[str] = ()) -> None:
    """Raise ValueError unless ``path`` can become a file, with one of ``endings`` if any are given. Leaves nothing behind."""
    if endings and path.suffix not in endings:
        raise ValueError(f"{setting} {path}: the name of a picture ends with {', '.join(endings[:-1])} or {endings[-1]}")
    if path.is_dir():
        raise ValueError(f"{setting} {path}: this is a folder, where a file was expected; name one in it")
    _check(path.parent, f"{setting} {path}")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{setting} {path}: this file may not be written; give another name, or make it writable")
