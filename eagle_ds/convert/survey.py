"""A look at a few files before the work: what most of them are, what they will shrink to, and how fast this machine is."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from eagle_ds.convert.formats import RawSample
from eagle_ds.convert.rejected import Reason, Rejected
from eagle_ds.convert.sources import SourceItem
from eagle_ds.store.codec import encode_chunk
from eagle_ds.store.format import CHUNK_ROWS, TORCH_DTYPES, raw_view

logger = logging.getLogger(__name__)

PROBES = 9
GZIP_PROBES = 3  # each has to be inflated whole
WORK_PER_ENCODING = 1.4  # checksums, checks and writing come on top of encoding (docs/benchmarks/convert.md)
START_S = 4.0  # importing torch, in every process
ENCODED_CHUNKS = 16  # a probe, when size and time are predicted


@dataclass
class Survey:
    """What the probes said. Sizes are those of most of them; hidden states in bytes are "raw"."""

    hidden_size: int
    num_aux: int
    dtype: str
    before_norm: bool
    has_mask: bool
    raw_per_file_byte: float
    read_s_per_file_byte: float


@dataclass
class _Probe:
    item: SourceItem
    hidden_size: int
    num_aux: int
    dtype: str
    before_norm: bool
    has_mask: bool
    raw_bytes: int
    read_s: float


@dataclass
class Prediction:
    """What a conversion will need, from encoding some chunks of the probes."""

    source_bytes: int
    raw_bytes: int
    stored_bytes: int
    seconds: float
    head_s: float  # of those, for the target's head


def survey(items: Sequence[SourceItem], workers: int = 1) -> tuple[Survey | None, list[Rejected]]:
    """Look at files spread over the list, and on through it until one can be read. None if no file can: then every
    file's `Rejected` comes back."""
    spread = _spread(len(items), GZIP_PROBES if items[0].path.suffix == ".gz" else PROBES)
    with ThreadPoolExecutor(workers) as pool:  # inflating lets go of the interpreter
        looked = list(pool.map(_look, (items[index] for index in spread)))
    for index in sorted(set(range(len(items))) - set(spread)):
        if any(isinstance(found, _Probe) for found in looked):
            break
        looked.append(_look(items[index]))
    probes = [found for found in looked if isinstance(found, _Probe)]
    return (_majority(probes), []) if probes else (None, [found for found in looked if isinstance(found, Rejected)])


def _look(item: SourceItem) -> _Probe | Rejected:
    try:
        return _probe(item)
    except Rejected as error:
        return error


def predict(items: Sequence[SourceItem], survey: Survey, workers: int, head: torch.Tensor | None) -> Prediction:
    """Size and time of converting ``items``, CPU alone: the disk may be slower."""
    ratio, encode_s_per_byte = _encode_some(items, survey)
    source_bytes = sum(item.file_bytes for item in items)
    raw_bytes = int(source_bytes * survey.raw_per_file_byte)
    head_s = 0.0
    if head is not None:
        rows = raw_bytes / ((survey.num_aux + 1) * survey.hidden_size * TORCH_DTYPES[survey.dtype].itemsize)
        head_s = rows * head_s_per_row(head) / workers
    work_s = source_bytes * survey.read_s_per_file_byte + raw_bytes * encode_s_per_byte * WORK_PER_ENCODING
    seconds = START_S + work_s / workers + head_s
    return Prediction(source_bytes, raw_bytes, int(raw_bytes * ratio), seconds, head_s)


def _probe(item: SourceItem) -> _Probe:
    begin = time.perf_counter()
    raw = item.read(checksums=False)
    read_s = time.perf_counter() - begin
    width = raw.last.shape[1]
    dtype = str(raw.last.dtype).removeprefix("torch.")
    if dtype not in TORCH_DTYPES or width == 0:
        raise Rejected(item.place, Reason.DTYPE, f"hidden_state is {raw.last.dtype} {list(raw.last.shape)}, expected floating-point states")
    num_aux = raw.aux.shape[1] // max(1, width)
    return _Probe(item, width, num_aux, dtype, raw.before_norm, raw.loss_mask is not None, raw.nbytes, read_s)


def _majority(probes: list[_Probe]) -> Survey:
    def most(name: str) -> object:
        counts = Counter(getattr(probe, name) for probe in probes)
        if len(counts) > 1:
            logger.warning("files differ in %s: %s; the most frequent is taken, the others will be rejected", name, dict(counts))
        return counts.most_common(1)[0][0]

    file_bytes = sum(probe.item.file_bytes for probe in probes) or 1
    return Survey(
        **{name: most(name) for name in ("hidden_size", "num_aux", "dtype", "before_norm")},
        has_mask=any(probe.has_mask for probe in probes),
        raw_per_file_byte=sum(probe.raw_bytes for probe in probes) / file_bytes,
        read_s_per_file_byte=sum(probe.read_s for probe in probes) / file_bytes,
    )


def _encode_some(items: Sequence[SourceItem], survey: Survey) -> tuple[float, float]:
    """(stored bytes per raw byte, seconds per raw byte) over chunks spread through a few files."""
    raw_bytes = stored_bytes = 0
    seconds = 0.0
    for index in _spread(len(items), GZIP_PROBES):
        try:
            raw = items[index].read(checksums=False)
        except Rejected:
            continue
        for chunk in _some_chunks(raw, survey):
            rows = raw_view(chunk)
            begin = time.perf_counter()
            stored_bytes += len(encode_chunk(rows))
            seconds += time.perf_counter() - begin
            raw_bytes += rows.nbytes
    return (stored_bytes / raw_bytes, seconds / raw_bytes) if raw_bytes else (1.0, 0.0)


def _some_chunks(raw: RawSample, survey: Survey) -> list[torch.Tensor]:
    """Chunks of 64 rows of one layer, taking turns through the layers."""
    layers = [*raw.aux.split(survey.hidden_size, 1), raw.last]
    starts = _spread(max(1, len(raw.last) // CHUNK_ROWS), ENCODED_CHUNKS)
    return [layers[turn % len(layers)][start * CHUNK_ROWS : (start + 1) * CHUNK_ROWS] for turn, start in enumerate(starts)]


def head_s_per_row(head: torch.Tensor) -> float:
    """Seconds that the head takes for a token, measured on a few."""
    from eagle_ds.convert.completion import token_labels

    rows = torch.zeros(64, head.shape[1], dtype=head.dtype)
    begin = time.perf_counter()
    token_labels(rows, head)
    return (time.perf_counter() - begin) / len(rows)


def _spread(length: int, count: int) -> list[int]:
    """Up to ``count`` indices, evenly over ``length``."""
    return sorted({int(index * (length - 1) / max(1, min(count, length) - 1)) for index in range(min(count, length))})
