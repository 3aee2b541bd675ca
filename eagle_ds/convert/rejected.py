"""Why a source file is not converted: a reason to count by, and a sentence that says what was found and expected."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path


class Reason(StrEnum):
    """What a rejected file suffers from; the summary counts by these."""

    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    UNSAFE = "unsafe pickle"
    UNREADABLE = "unreadable"
    MISSING_KEY = "missing key"
    WRONG_SHAPE = "wrong shape"
    EMPTY = "no tokens"
    DTYPE = "dtype"
    HIDDEN_SIZE = "hidden size differs"
    NOT_FINITE = "NaN or Inf"
    TOKEN_RANGE = "token ids"
    MASK = "loss mask"
    FINAL_NORM = "final norm"
    DUPLICATE = "duplicate id"
    READBACK = "read-back differs"
    FAILED = "conversion failed"
    WORKER = "worker died"


def printable(text: str) -> str:
    """File names are bytes: those that are no UTF-8 come out with backslashes, fit for JSON and terminals."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class Rejected(ValueError):
    """One sample that cannot be converted. ``path`` is where it lies; ``detail`` names what was found and expected."""

    def __init__(self, path: Path | str, reason: Reason, detail: str) -> None:
        super().__init__(path, reason, detail)
        self.path, self.reason, self.detail = printable(str(path)), reason, detail

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}: {self.detail}"
