"""What a sample's HDF5 file looks like, schema 1: types, datasets, filters and header, and the checks on opening one.

Every byte that a reader relies on lies under a checksum: object headers and the chunk index under HDF5's own (libver
v110), the datasets under their zlib streams' adler32, which any reader checks, and a crc32, which ours does (why: see
data/codec.py). So header strings have a fixed length (HDF5 keeps variable ones in an unchecked heap) and even the small
datasets are chunked and gzip-filtered. The crc32 of a small dataset is its attribute; those of a wide one's chunks are a small
dataset of their own, uint32 [chunks of rows, layers]. A file without them (made by other means) is read all the same.
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
CHUNK_ROWS = 64
SMALL_CHUNK = 65_536
CRC32 = "crc32"
WIDE_NAMES = ("aux_hidden_state", "hidden_state")
SMALL_DTYPES = {"input_ids": np.int32, "loss_mask": np.uint8, "target_token_id": np.int32, "target_logsumexp": np.float32}
Datasets = Mapping[str, h5py.Dataset]
OPTIONAL_NAMES = ("target_token_id", "target_logsumexp")
TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_INTEGERS = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}


@dataclass
class Sample:
    """One conversation and what the target made of it, nothing shifted (torch CPU tensors)."""

    id: str
    input_ids: torch.Tensor  # int32 [S]
    loss_mask: torch.Tensor  # uint8 [S], 1 where the token is trained
    aux_hidden_state: torch.Tensor  # [S, A * H], the aux layers' outputs side by side
    hidden_state: torch.Tensor  # [S, H], what the target's lm_head reads
    target_token_id: torch.Tensor | None = None  # int32 [S], argmax of head(hidden_state) over the full vocabulary
    target_logsumexp: torch.Tensor | None = None  # float32 [S], its log-sum-exp

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Header:
    """A file's attributes, decoded."""

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
    """The HDF5 type of stored hidden states; bfloat16 is a true 16-bit float with 8 exponent bits, not an opaque integer."""
    if dtype == "float16":
        return h5py.h5t.IEEE_F16LE.copy()
    kind = h5py.h5t.IEEE_F32LE.copy()
    if dtype == "bfloat16":
        kind.set_fields(15, 7, 8, 0, 7)  # sign bit 15; exponent bits 7-14; mantissa bits 0-6
        kind.set_size(2)
        kind.set_ebias(127)
    return kind


def torch_dtype(kind: h5py.h5t.TypeID) -> torch.dtype:
    """Of hidden states stored as ``kind``."""
    for name, dtype in TORCH_DTYPES.items():
        if storage_type(name).equal(kind):
            return dtype
    raise StoreError(f"hidden states are stored as {kind.dtype}, expected one of {', '.join(TORCH_DTYPES)}")


def raw_view(tensor: torch.Tensor) -> np.ndarray:
    """The same memory as unsigned integers of the same width, because numpy knows no bfloat16."""
    return tensor.detach().view(_INTEGERS[tensor.itemsize][0]).numpy().view(unsigned(tensor.itemsize))


def unsigned(itemsize: int) -> type[np.unsignedinteger]:
    """The numpy type that hidden states of so many bytes are handled as."""
    return _INTEGERS[itemsize][1]


def check_sample(sample: Sample, info: StoreInfo) -> None:
    """Raise ValueError unless the sample has the shapes, dtypes and value ranges that the store's facts promise."""
    num_tokens, width = sample.num_tokens, len(info.aux_layer_ids) * info.hidden_size
    state = TORCH_DTYPES[info.dtype]
    expected = {
        "input_ids": (torch.int32, (num_tokens,)),
        "loss_mask": (torch.uint8, (num_tokens,)),
        "aux_hidden_state": (state, (num_tokens, width)),
        "hidden_state": (state, (num_tokens, info.hidden_size)),
        "target_token_id": (torch.int32, (num_tokens,)),
        "target_logsumexp": (torch.float32, (num_tokens,)),
    }
    if num_tokens == 0:
        raise ValueError(f"sample {sample.id!r} has no tokens")
    for name, (dtype, shape) in expected.items():
        tensor = getattr(sample, name)
        if tensor is None and name in OPTIONAL_NAMES:
            continue
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"sample {sample.id!r}: {name} is {tensor.dtype} {list(tensor.shape)}, this store holds {dtype} {list(shape)}; "
                "convert it explicitly, nothing is cast on the way in"
            )
    if int(sample.input_ids.min()) < 0 or int(sample.input_ids.max()) >= info.vocab_size:
        raise ValueError(f"sample {sample.id!r}: input_ids reach outside 0..{info.vocab_size - 1}, the target's vocabulary")
    if int(sample.loss_mask.max()) > 1:
        raise ValueError(f"sample {sample.id!r}: loss_mask holds {int(sample.loss_mask.max())}, expected 0 or 1")


def create_file(sink: BinaryIO) -> h5py.File:
    """An empty file in a format whose metadata is checksummed throughout."""
    return h5py.File(sink, "w", libver=("v110", "v110"))


def create_wide(file: h5py.File, name: str, num_tokens: int, width: int, info: StoreInfo) -> h5py.h5d.DatasetID:
    """An empty [S, width] dataset, one layer's 64 rows a chunk, shuffle + gzip, never filled: we write each chunk ourselves."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((min(CHUNK_ROWS, num_tokens), info.hidden_size))
    plist.set_shuffle()
    plist.set_deflate(6)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple((num_tokens, width))
    return h5py.h5d.create(file.id, name.encode(), storage_type(info.dtype), space, dcpl=plist)


def write_small(file: h5py.File, name: str, values: np.ndarray) -> None:
    """A dataset under HDF5's own gzip, and its crc32."""
    chunk = (min(SMALL_CHUNK, len(values)), *values.shape[1:])
    dataset = file.create_dataset(name, data=values, chunks=chunk, shuffle=True, compression="gzip", compression_opts=4)
    dataset.attrs[CRC32] = np.uint32(zlib.crc32(values.tobytes()))


def write_header(file: h5py.File, sample: Sample, info: StoreInfo) -> None:
    """Attributes; ``complete`` comes last, after every chunk."""
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
    """Decode the attributes; raises StoreError for a missing one, an unknown schema or an unfinished file."""
    attrs = file.attrs
    if (schema := attrs.get("schema")) is None:
        raise StoreError("it has no readable schema attribute: a damaged file, or not one of ours (tools/convert_ckpt_to_hdf5.py --map)")
    if schema != SCHEMA:
        raise StoreError(f"schema is {schema}, this version reads {SCHEMA}; write the store again")
    if attrs.get("complete") != 1:
        raise StoreError("the file was never completed; delete it and write the sample again")
    missing = [name for name in Header.__dataclass_fields__ if name not in attrs]
    if missing:
        raise StoreError(f"attributes are missing: {', '.join(missing)}")
    strings = {name: _text(attrs[name]) for name in ("id", "target", "target_hash", "tokenizer_hash", "encoder", "dtype")}
    return Header(
        num_tokens=int(attrs["num_tokens"]),
        hidden_size=int(attrs["hidden_size"]),
        aux_layer_ids=tuple(int(layer) for layer in attrs["aux_layer_ids"]),
        **strings,
    )


def open_datasets(file: h5py.File) -> Datasets:
    """Every dataset by name, looked up once: to h5py that is most of the work of opening a short sample."""
    return {name: file[name] for name in file}  # not items(): it keeps quiet about a damaged one


def check_datasets(datasets: Datasets, header: Header) -> None:
    """Raise StoreError unless each dataset has the shape and type that the header implies."""
    width = {"aux_hidden_state": len(header.aux_layer_ids) * header.hidden_size, "hidden_state": header.hidden_size}
    if header.dtype not in TORCH_DTYPES:
        raise StoreError(f"dtype is {header.dtype!r}, expected one of {', '.join(TORCH_DTYPES)}")
    for name in (*WIDE_NAMES, *SMALL_DTYPES):
        if name not in datasets:
            if name in OPTIONAL_NAMES:
                continue
            raise StoreError(f"dataset {name} is missing")
        shape = (header.num_tokens, width[name]) if name in width else (header.num_tokens,)
        dataset = datasets[name]
        if dataset.shape != shape:
            raise StoreError(f"{name} has shape {list(dataset.shape)}, expected {list(shape)}")
        kind = storage_type(header.dtype) if name in width else h5py.h5t.py_create(np.dtype(SMALL_DTYPES[name]))
        if not dataset.id.get_type().equal(kind):
            raise StoreError(f"{name} has another type than {header.dtype if name in width else SMALL_DTYPES[name].__name__}")


def read_small(dataset: h5py.Dataset) -> np.ndarray:
    """A whole small dataset, checked."""
    name, stored_crc32 = dataset.name[1:], dataset.attrs.get(CRC32)
    if h5py.h5z.FILTER_DEFLATE not in filters(dataset):
        raise StoreError(f"{name} is not gzip-filtered, so nothing guards its bytes; write this sample again")
    try:
        values = dataset[()]
    except OSError as error:
        raise StoreError(f"{name} is damaged ({error}); write this sample again") from error
    if stored_crc32 is not None and zlib.crc32(values.tobytes()) != stored_crc32:
        raise StoreError(f"{name} is damaged (its crc32 is not the one that was stored with it); write this sample again")
    return values


def crc32_name(name: str) -> str:
    """The dataset that holds the crc32 of a wide dataset's chunks."""
    return f"{name}_{CRC32}"


def filters(dataset: h5py.Dataset) -> list[int]:
    """HDF5 filter numbers in the order of the pipeline."""
    plist = dataset.id.get_create_plist()
    return [plist.get_filter(index)[0] for index in range(plist.get_nfilters())]


def _set_string(file: h5py.File, name: str, text: str) -> None:
    data = text.encode()
    file.attrs.create(name, np.bytes_(data), dtype=h5py.string_dtype("utf-8", max(1, len(data))))


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
