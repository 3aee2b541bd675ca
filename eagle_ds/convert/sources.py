"""Find the samples: a file or a tree of files of any known format, as a list of `SourceItem`."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from eagle_ds.convert.completion import Completer
from eagle_ds.convert.formats import RawSample, Reason, Rejected, from_torch_dict, printable, read_safetensors
from eagle_ds.convert.hdf5_files import IDENTITY, Hdf5Map, natural_key, read_hdf5, sample_groups
from eagle_ds.convert.torch_files import load_torch
from eagle_ds.store.format import Sample

TORCH_SUFFIXES = (".ckpt", ".ckpt.gz", ".pt", ".pt.gz")
SAFETENSORS_SUFFIXES = (".safetensors",)
HDF5_SUFFIXES = (".h5", ".hdf5")
ALL_SUFFIXES = TORCH_SUFFIXES + SAFETENSORS_SUFFIXES + HDF5_SUFFIXES


@dataclass(frozen=True)
class SourceItem:
    """One sample to convert, not read yet. Its ``id`` follows from its path."""

    id: str
    path: Path
    file_bytes: int  # an equal share of the file if it holds many samples
    group: str = ""  # within an HDF5 file of many samples
    mapping: Hdf5Map | None = None  # None: this project's own dataset names

    @property
    def place(self) -> str:
        """The path, and the group if there is one, for messages."""
        return f"{self.path}/{self.group}" if self.group else str(self.path)

    def read(self, checksums: bool = True) -> RawSample:
        """Read what the file holds. Every error that a library raises for a damaged file becomes `Rejected`.

        Without ``checksums`` a plain torch file is mapped into memory, and only the pages in use are read.
        """
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise Rejected(Reason.UNREADABLE, "a device, pipe or socket, expected a regular file")
            return self._parse(checksums)
        except Rejected as error:
            raise error.at(self.place) from error.__cause__
        except FileNotFoundError as error:
            missing = "a link to nowhere" if self.path.is_symlink() else "the file is gone"
            raise Rejected(Reason.UNREADABLE, f"{missing}, expected a file that can be read") from error
        except OSError as error:
            raise Rejected(Reason.UNREADABLE, f"cannot be read ({error.strerror or error})") from error
        except Exception as error:
            detail = f"reading it failed ({type(error).__name__}: {str(error)[:200]}); write the file again"
            raise Rejected(Reason.UNREADABLE, detail) from error

    def _parse(self, checksums: bool) -> RawSample:
        suffix = known_suffix(self.path)
        if suffix in TORCH_SUFFIXES:
            return from_torch_dict(load_torch(self.path, checksums))
        if suffix in SAFETENSORS_SUFFIXES:
            return read_safetensors(self.path)
        return read_hdf5(self.path, self.mapping or IDENTITY, self.group)

    def load(self, completer: Completer | None = None) -> Sample:
        """Read the sample, check it and complete it. Raises `Rejected`."""
        try:
            return (completer or Completer()).complete(self.id, self.read())
        except Rejected as error:
            raise error.at(self.place) from error.__cause__


def iter_source(path: str | Path, mapping: Hdf5Map | None = None) -> Iterator[SourceItem]:
    """Yield every sample at ``path``, a file or a tree, in natural order. Links are followed.

    A file that cannot be opened, such as a broken link, is yielded as one item whose ``read`` raises the
    reason.

    Raises: ValueError if there is nothing to convert.
    """
    root = Path(path)
    suffixes = ", ".join(ALL_SUFFIXES)
    if not root.exists():
        raise ValueError(f"source {root} does not exist; give a file or a folder of {suffixes} files")
    is_empty = True
    for file in _files(root):
        relative = file.name if file == root else file.relative_to(root).as_posix()
        for item in _items(file, relative.removesuffix(known_suffix(file)), mapping):
            is_empty = False
            yield item
    if is_empty:
        raise ValueError(f"source {root} holds no file of a known format ({suffixes}); check the path")


def known_suffix(path: Path) -> str:
    """Return the suffix of a known format, such as ``.ckpt.gz``, or an empty string."""
    return max((suffix for suffix in ALL_SUFFIXES if path.name.endswith(suffix)), key=len, default="")


def _items(file: Path, name: str, mapping: Hdf5Map | None) -> Iterator[SourceItem]:
    """Yield the samples of one file: one, or one for each group that the map's ``*`` stands for."""
    name = printable(name)  # ids are written to JSON
    is_regular = file.is_file()
    size = file.stat().st_size if is_regular else 0
    if known_suffix(file) not in HDF5_SUFFIXES or mapping is None or not is_regular:
        yield SourceItem(name, file, size)
        return
    try:
        groups = list(sample_groups(file, mapping)) or [""]
    except (Rejected, RuntimeError, OSError, KeyError):
        groups = [""]
    for group in groups:
        yield SourceItem(f"{name}/{group}" if group else name, file, size // len(groups), group, mapping)


def _files(root: Path) -> Iterator[Path]:
    """Yield the files of known formats, each folder once."""
    if not root.is_dir():
        if known_suffix(root):
            yield root
        return
    visited = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link back into the tree
            subfolders.clear()
            continue
        visited.add(real)
        subfolders.sort(key=natural_key)
        for name in sorted(names, key=natural_key):
            if known_suffix(Path(name)) and not name.startswith("."):
                yield Path(folder) / name
