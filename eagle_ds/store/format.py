"""Define the HDF5 file of one sample, schema 1: its types, datasets, filters and header, and their checks.

Every byte that a reader relies on is protected by a checksum:

- object headers and the chunk index by HDF5's own checksums (file format v110);
- each dataset by the adler32 of its zlib streams, which every reader checks, and by a crc32, which ours
  checks too (store/codec.py says why).

Two choices follow. Header strings have a fixed length, because HDF5 keeps variable-length strings in a heap
without a checksum. Even small datasets are chunked and gzip-filtered.

The crc32 of a small dataset is an attribute of it. The crc32s of a hidden-state dataset's chunks form a small
dataset of their own: uint32 [chunks of rows, layers]. Files without crc32s (made by other programs) can be
read too.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

import h5py
import numpy as np
import torch

from eagle_ds.store.codec import ENCODER
from eagle_ds.store.manifest import StoreError, StoreInfo

SCHEMA = 1
CHUNK_ROWS = 64  # rows of one layer in a chunk: 512 KiB of bfloat16 at H = 4096
SMALL_CHUNK = 65_536  # elements
CRC32 = "crc32"
WIDE_NAMES = ("aux_hidden_state", "hidden_state")
SMALL_DTYPES = {
    "input_ids": np.int32, "loss_mask": np.uint8, "target_token_id": np.int32, "target_logsumexp": np.float32,
}
OPTIONAL_NAMES = ("target_token_id", "target_logsumexp")
Datasets = Mapping[str, h5py.Dataset]
TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by item size in bytes


@dataclass
class Sample:
    """One conversation and the target's hidden states for it: CPU tensors, row p belongs to token p."""

    id: str
    input_ids: torch.Tensor  # int32 [S]
    loss_mask: torch.Tensor  # uint8 [S], 1 where the token is trained
    aux_hidden_state: torch.Tensor  # [S, A * H], the aux layers' outputs concatenated
    hidden_state: torch.Tensor  # [S, H], what the target's lm_head reads
    target_token_id: torch.Tensor | None = None  # int32 [S], argmax of the target's logits
    target_logsumexp: torch.Tensor | None = None  # float32 [S], log-sum-exp of the same logits

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Header:
    """The attributes of a file, decoded."""

    id: str
    num_tokens: int
    hidden_size: int
    aux_layer_ids: tuple[int, ...]
    target: str
    target_hash: str
    tokenizer_hash: str
    encoder: str
    dtype: str


def storage_type(dtype: str) -> h5py.h5t.TypeFloatID:
    """Return the HDF5 type of hidden states.

    bfloat16 is a true 16-bit float type, so any HDF5 tool shows its numbers.
    """
    if dtype == "float16":
        return h5py.h5t.IEEE_F16LE.copy()
    kind = h5py.h5t.IEEE_F32LE.copy()
    if dtype == "bfloat16":
        kind.set_fields(15, 7, 8, 0, 7)  # sign bit 15; exponent bits 7-14; mantissa bits 0-6
        kind.set_size(2)
        kind.set_ebias(127)
    return kind


def torch_dtype(kind: h5py.h5t.TypeID) -> torch.dtype:
    """Return the torch dtype of hidden states stored as ``kind``; StoreError if it is not one of ours."""
    for name, dtype in TORCH_DTYPES.items():
        if storage_type(name).equal(kind):
            return dtype
    raise StoreError(f"hidden states are stored as {kind.dtype}, expected one of {', '.join(TORCH_DTYPES)}")


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Compare two tensors of one dtype as integers: NaN then equals itself, and -0 differs from 0."""
    kind = _INTEGERS[ours.itemsize]
    return torch.equal(ours.view(kind), theirs.view(kind))


def raw_view(tensor: torch.Tensor) -> np.ndarray:
    """View a tensor's memory as unsigned integers of the same width, because numpy has no bfloat16."""
    return tensor.detach().view(_INTEGERS[tensor.itemsize]).numpy().view(f"u{tensor.itemsize}")


def _dtypes_and_shapes(num_tokens: int, of: StoreInfo | Header) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the dtype and the shape that each dataset must have, by name."""
    return {
        "aux_hidden_state": (of.dtype, (num_tokens, len(of.aux_layer_ids) * of.hidden_size)),
        "hidden_state": (of.dtype, (num_tokens, of.hidden_size)),
        **{name: (dtype.__name__, (num_tokens,)) for name, dtype in SMALL_DTYPES.items()}}


def check_sample(sample: Sample, info: StoreInfo) -> None:
    """Raise ValueError unless the sample has the shapes, dtypes and value ranges that ``info`` declares."""
    if sample.num_tokens == 0:
        raise ValueError(f"sample {sample.id!r} has no tokens")
    for name, (dtype, shape) in _dtypes_and_shapes(sample.num_tokens, info).items():
        tensor = getattr(sample, name)
        if tensor is None and name in OPTIONAL_NAMES:
            continue
        if tensor.dtype != getattr(torch, dtype) or tuple(tensor.shape) != shape:
            found = f"sample {sample.id!r}: {name} is {tensor.dtype} {list(tensor.shape)}"
            expected = f"torch.{dtype} {list(shape)}"
            raise ValueError(f"{found}, this store holds {expected}; convert it, nothing is cast")
    if int(sample.input_ids.min()) < 0 or int(sample.input_ids.max()) >= info.vocab_size:
        expected_ids = f"0..{info.vocab_size - 1}; use the target's own tokenizer"
        raise ValueError(f"sample {sample.id!r}: input_ids leave the target's vocabulary {expected_ids}")
    if (most := int(sample.loss_mask.max())) > 1:
        raise ValueError(f"sample {sample.id!r}: loss_mask holds {most}, expected 0 or 1")


def create_file(sink: BinaryIO) -> h5py.File:
    """Create an empty file in the format version whose metadata has checksums everywhere."""
    return h5py.File(sink, "w", libver=("v110", "v110"))


def create_wide(file: h5py.File, name: str, shape: tuple[int, int], info: StoreInfo) -> h5py.h5d.DatasetID:
    """Create an empty hidden-state dataset [S, width] with the filters shuffle + gzip.

    A chunk holds 64 rows of one layer. HDF5 writes no fill values, because the writer stores every chunk
    itself.
    """
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((min(CHUNK_ROWS, shape[0]), info.hidden_size))
    plist.set_shuffle()
    plist.set_deflate(6)  # a label only: chunks are written already compressed, and inflating needs no level
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple(shape)
    return h5py.h5d.create(file.id, name.encode(), storage_type(info.dtype), space, dcpl=plist)


def write_small(file: h5py.File, name: str, values: np.ndarray) -> None:
    """Write a small dataset, compressed by HDF5 itself, with its crc32 as an attribute."""
    chunk = (min(SMALL_CHUNK, len(values)), *values.shape[1:])
    gzip = {"shuffle": True, "compression": "gzip", "compression_opts": 4}
    dataset = file.create_dataset(name, data=values, chunks=chunk, **gzip)
    dataset.attrs[CRC32] = np.uint32(zlib.crc32(values.tobytes()))


def write_header(file: h5py.File, sample: Sample, info: StoreInfo) -> None:
    """Write the attributes, ``complete`` last: a file that has it is whole."""
    for name in ("target", "target_hash", "tokenizer_hash", "dtype"):
        _set_string(file, name, getattr(info, name))
    _set_string(file, "id", sample.id)
    _set_string(file, "encoder", ENCODER)
    file.attrs["schema"] = np.int32(SCHEMA)
    file.attrs["num_tokens"] = np.int64(sample.num_tokens)
    file.attrs["hidden_size"] = np.int64(info.hidden_size)
    file.attrs["aux_layer_ids"] = np.array(info.aux_layer_ids, np.int64)
    file.attrs["complete"] = np.uint8(1)


def read_header(file: h5py.File) -> Header:
    """Decode the attributes.

    Raises StoreError if one is missing, the schema is unknown, or the file is unfinished.
    """
    attrs = file.attrs
    if (schema := attrs.get("schema")) is None:
        raise StoreError(
            "it has no readable schema attribute: it is damaged, or another program wrote it "
            "(tools/convert_ckpt_to_hdf5.py --map imports such files)")
    if schema != SCHEMA:
        raise StoreError(f"schema is {schema}, this version reads {SCHEMA}; write the store again")
    if attrs.get("complete") != 1:
        raise StoreError("the file was never completed; delete it and write the sample again")
    missing = [name for name in Header.__dataclass_fields__ if name not in attrs]
    if missing:
        raise StoreError(f"attributes are missing: {', '.join(missing)}; write this sample again")
    names = ("id", "target", "target_hash", "tokenizer_hash", "encoder", "dtype")
    strings = {name: _text(attrs[name]) for name in names}
    return Header(
        num_tokens=int(attrs["num_tokens"]), hidden_size=int(attrs["hidden_size"]),
        aux_layer_ids=tuple(map(int, attrs["aux_layer_ids"])), **strings)


def open_datasets(file: h5py.File) -> Datasets:
    """Look up every dataset once, because the look-ups are most of the cost of opening a short sample."""
    return {name: file[name] for name in file}  # file.items() would silently skip a damaged dataset


def check_datasets(datasets: Datasets, header: Header) -> None:
    """Raise StoreError unless each dataset exists with the shape and type that the header implies."""
    if header.dtype not in TORCH_DTYPES:
        raise StoreError(f"dtype is {header.dtype!r}, expected one of {', '.join(TORCH_DTYPES)}")
    for name, (dtype, shape) in _dtypes_and_shapes(header.num_tokens, header).items():
        if name not in datasets:
            if name in OPTIONAL_NAMES:
                continue
            raise StoreError(f"dataset {name} is missing; write this sample again")
        dataset = datasets[name]
        if dataset.shape != shape:
            raise StoreError(
                f"{name} has shape {list(dataset.shape)}, expected {list(shape)}; write this sample again")
        kind = storage_type(dtype) if name in WIDE_NAMES else h5py.h5t.py_create(np.dtype(dtype))
        if not dataset.id.get_type().equal(kind):
            raise StoreError(f"{name} has another type than {dtype}; write this sample again")


def read_small(dataset: h5py.Dataset) -> np.ndarray:
    """Read a whole small dataset and check its crc32.

    Raises StoreError if it is damaged or not compressed.
    """
    name, stored_crc32 = dataset.name[1:], dataset.attrs.get(CRC32)
    check_gzip(dataset)
    try:
        values = dataset[()]
    except OSError as error:
        raise StoreError(f"{name} is damaged ({error}); write this sample again") from error
    if stored_crc32 is not None and zlib.crc32(values.tobytes()) != stored_crc32:
        raise StoreError(f"{name} is damaged (its crc32 is not the stored one); write this sample again")
    return values


def crc32_name(name: str) -> str:
    """Return the name of the dataset that holds the crc32s of a hidden-state dataset's chunks."""
    return f"{name}_{CRC32}"


def check_gzip(dataset: h5py.Dataset) -> list[int]:
    """Return the dataset's HDF5 filter numbers in order. Raises StoreError unless gzip is among them.

    Without gzip there is no zlib stream, so no adler32 would protect the data.
    """
    plist = dataset.id.get_create_plist()
    filters = [plist.get_filter(index)[0] for index in range(plist.get_nfilters())]
    if h5py.h5z.FILTER_DEFLATE not in filters:
        name = dataset.name[1:]
        raise StoreError(f"{name} is not gzip-filtered, so no checksum protects it; write this sample again")
    return filters


def _set_string(file: h5py.File, name: str, text: str) -> None:
    data = text.encode()
    file.attrs.create(name, np.bytes_(data), dtype=h5py.string_dtype("utf-8", max(1, len(data))))


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
