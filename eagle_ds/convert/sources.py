"""Finding samples: a file or a tree of files of any known format, as a list of `SourceItem`."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eagle_ds.convert.formats import RawSample, read_safetensors, read_torch
from eagle_ds.convert.hdf5_files import IDENTITY, Hdf5Map, natural_key, read_hdf5, sample_groups
from eagle_ds.convert.rejected import Reason, Rejected, printable
from eagle_ds.store.format import Sample

if TYPE_CHECKING:
    from eagle_ds.convert.completion import Completer

TORCH_SUFFIXES = (".ckpt", ".ckpt.gz", ".pt", ".pt.gz")
SAFETENSORS_SUFFIXES = (".safetensors",)
HDF5_SUFFIXES = (".h5", ".hdf5")
ALL_SUFFIXES = TORCH_SUFFIXES + SAFETENSORS_SUFFIXES + HDF5_SUFFIXES


@dataclass(frozen=True)
class SourceItem:
    """One sample that waits to be converted; nothing of it has been read. ``id`` follows from where it lies."""

    id: str
    path: Path
    file_bytes: int
    group: str = ""  # within an HDF5 file of many samples
    mapping: Hdf5Map | None = None  # None: this project's own dataset names

    @property
    def place(self) -> str:
        """Path, and group where there is one, for messages."""
        return f"{self.path}/{self.group}" if self.group else str(self.path)

    def read(self, checksums: bool = True) -> RawSample:
        """What the file holds. Raises `Rejected`, whatever a library makes of a damaged file. Without ``checksums`` a plain
        torch file is only mapped, not read."""
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise Rejected(self.place, Reason.UNREADABLE, "a device, pipe or socket, expected a regular file")
            return self._parse(checksums)
        except Rejected:
            raise
        except FileNotFoundError as error:
            missing = "a link to nowhere" if self.path.is_symlink() else "it is gone"
            raise Rejected(self.place, Reason.UNREADABLE, f"{missing}, expected a file that can be read") from error
        except OSError as error:
            raise Rejected(self.place, Reason.UNREADABLE, f"cannot be read ({error.strerror or error})") from error
        except Exception as error:
            detail = f"reading it failed ({type(error).__name__}: {str(error)[:200]}); write the file again"
            raise Rejected(self.place, Reason.UNREADABLE, detail) from error

    def _parse(self, checksums: bool) -> RawSample:
        suffix = known_suffix(self.path)
        if suffix in TORCH_SUFFIXES:
            return read_torch(self.path, checksums)
        if suffix in SAFETENSORS_SUFFIXES:
            return read_safetensors(self.path)
        return read_hdf5(self.path, self.mapping or IDENTITY, self.group)

    def load(self, completer: Completer | None = None) -> Sample:
        """The sample, checked and completed. Raises `Rejected`."""
        from eagle_ds.convert.completion import Completer

        return (completer or Completer()).complete(self.id, self.place, self.read())


def iter_source(path: str | Path, mapping: Hdf5Map | None = None) -> Iterator[SourceItem]:
    """Every sample at ``path``, a file or a tree, in natural order; files of other kinds are passed over, links are followed.

    What cannot be opened (an HDF5 file of many samples, a link to nowhere) is handed out as one item, whose ``read`` says why.
    Raises ValueError where there is nothing to convert.
    """
    root = Path(path)
    if not root.exists():
        raise ValueError(f"source {root} does not exist; give a file or a folder of {', '.join(ALL_SUFFIXES)} files")
    found = False
    for file in _files(root):
        relative = file.name if file == root else file.relative_to(root).as_posix()
        for item in _items(file, relative.removesuffix(known_suffix(file)), mapping):
            found = True
            yield item
    if not found:
        raise ValueError(f"source {root} holds no file of a known format ({', '.join(ALL_SUFFIXES)})")


def known_suffix(path: Path) -> str:
    """The format's suffix, ``.ckpt.gz`` included, or an empty string."""
    return max((suffix for suffix in ALL_SUFFIXES if path.name.endswith(suffix)), key=len, default="")


def _items(file: Path, name: str, mapping: Hdf5Map | None) -> Iterator[SourceItem]:
    name = printable(name)  # ids go to JSON
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
