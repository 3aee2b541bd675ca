"""Look at a few files first: what most of them hold, how well they compress, how fast this machine is."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from eagle_ds.convert.completion import token_labels
from eagle_ds.convert.formats import RawSample, Reason, Rejected
from eagle_ds.convert.sources import SourceItem
from eagle_ds.store.codec import encode_chunk
from eagle_ds.store.format import CHUNK_ROWS, TORCH_DTYPES, raw_view

logger = logging.getLogger(__name__)

PROBES = 9  # files that are looked at
GZIP_PROBES = 3  # fewer: each has to be inflated whole
WORK_PER_ENCODING = 1.4  # checksums, checks and writing come on top of encoding (docs/benchmarks/convert.md)
START_S = 4.0  # importing torch, in every process
ENCODED_CHUNKS = 16  # of each probe, to predict size and time
HEAD_PROBE_ROWS = 64


@dataclass(frozen=True)
class Survey:
    """What one file holds. For several files: what most of them hold, with sizes and seconds summed."""

    hidden_size: int
    num_aux: int
    dtype: str
    before_norm: bool
    has_mask: bool
    file_bytes: int
    raw_bytes: int  # hidden states in memory
    read_s: float


@dataclass
class Prediction:
    """What a conversion will need."""

    source_bytes: int
    raw_bytes: int
    stored_bytes: int
    seconds: float
    head_s: float  # the part of ``seconds`` that the target's head needs


def survey(items: Sequence[SourceItem], workers: int = 1) -> tuple[Survey | None, list[Rejected]]:
    """Probe files spread over the list. If none of them can be read, probe the others until one can.

    Returns: the survey and an empty list; or None and the `Rejected` of every file if none can be read.
    """
    spread = spread_indices(len(items), GZIP_PROBES if items[0].path.suffix == ".gz" else PROBES)
    with ThreadPoolExecutor(workers) as pool:  # inflating releases the interpreter's lock
        results = list(pool.map(_probe, (items[index] for index in spread)))
    for index in sorted(set(range(len(items))) - set(spread)):
        if any(isinstance(result, Survey) for result in results):
            break
        results.append(_probe(items[index]))
    probes = [result for result in results if isinstance(result, Survey)]
    if not probes:
        return None, [result for result in results if isinstance(result, Rejected)]
    return _summarise(probes), []


def _probe(item: SourceItem) -> Survey | Rejected:
    begin = time.perf_counter()
    try:
        raw = item.read(checksums=False)
    except Rejected as error:
        return error.at(item.place)
    read_s = time.perf_counter() - begin
    width = raw.last.shape[1]
    dtype = str(raw.last.dtype).removeprefix("torch.")
    if dtype not in TORCH_DTYPES or width == 0:
        detail = f"hidden_state is {raw.last.dtype} {list(raw.last.shape)}, expected floating-point states"
        return Rejected(Reason.DTYPE, detail, item.place)
    num_aux, has_mask = raw.aux.shape[1] // width, raw.loss_mask is not None
    return Survey(width, num_aux, dtype, raw.before_norm, has_mask, item.file_bytes, raw.nbytes, read_s)


def _summarise(probes: list[Survey]) -> Survey:
    def most_frequent(name: str) -> object:
        counts = Counter(getattr(probe, name) for probe in probes)
        if len(counts) > 1:
            advice = "files with the most frequent value are converted, the others rejected"
            logger.warning("files differ in %s: %s; %s", name, dict(counts), advice)
        return counts.most_common(1)[0][0]

    return Survey(
        **{name: most_frequent(name) for name in ("hidden_size", "num_aux", "dtype", "before_norm")},
        **{name: sum(getattr(p, name) for p in probes) for name in ("file_bytes", "raw_bytes", "read_s")},
        has_mask=any(probe.has_mask for probe in probes))


def predict(
    items: Sequence[SourceItem], survey: Survey, workers: int, head: torch.Tensor | None
) -> Prediction:
    """Predict size and time of converting ``items`` by encoding a few chunks. A slow disk takes longer.

    ``head``: the target's head [V, H] if argmax and log-sum-exp of its logits are to be computed.
    """
    ratio, encode_s_per_byte = _time_encoding(items, survey)
    source_bytes = sum(item.file_bytes for item in items)
    files = source_bytes / max(1, survey.file_bytes)  # all items, in units of the surveyed files
    raw_bytes = int(files * survey.raw_bytes)
    head_s = 0.0
    if head is not None:
        row_bytes = (survey.num_aux + 1) * survey.hidden_size * TORCH_DTYPES[survey.dtype].itemsize
        head_s = raw_bytes / row_bytes * head_s_per_row(head) / workers
    work_s = files * survey.read_s + raw_bytes * encode_s_per_byte * WORK_PER_ENCODING
    seconds = START_S + work_s / workers + head_s
    return Prediction(source_bytes, raw_bytes, int(raw_bytes * ratio), seconds, head_s)


def _time_encoding(items: Sequence[SourceItem], survey: Survey) -> tuple[float, float]:
    """Encode chunks spread over a few files. Returns (stored bytes / raw bytes, seconds / raw bytes)."""
    raw_bytes = stored_bytes = 0
    seconds = 0.0
    for index in spread_indices(len(items), GZIP_PROBES):
        try:
            raw = items[index].read(checksums=False)
        except Rejected:
            continue
        for chunk in _some_chunks(raw, survey):
            rows = raw_view(chunk)
            begin = time.perf_counter()
            stored_bytes += len(encode_chunk(rows).stream)
            seconds += time.perf_counter() - begin
            raw_bytes += rows.nbytes
    return (stored_bytes / raw_bytes, seconds / raw_bytes) if raw_bytes else (1.0, 0.0)


def _some_chunks(raw: RawSample, survey: Survey) -> list[torch.Tensor]:
    """Return chunks of 64 rows of one layer each, spread over the sample, from each layer in turn."""
    layers = [*raw.aux.split(survey.hidden_size, 1), raw.last]
    chunks = []
    for turn, index in enumerate(spread_indices(max(1, len(raw.last) // CHUNK_ROWS), ENCODED_CHUNKS)):
        start = index * CHUNK_ROWS
        chunks.append(layers[turn % len(layers)][start : start + CHUNK_ROWS])
    return chunks


def head_s_per_row(head: torch.Tensor) -> float:
    """Measure the seconds that the target's head [V, H] needs for one token."""
    rows = torch.zeros(HEAD_PROBE_ROWS, head.shape[1], dtype=head.dtype)
    begin = time.perf_counter()
    token_labels(rows, head)
    return (time.perf_counter() - begin) / len(rows)


def spread_indices(length: int, count: int) -> list[int]:
    """Return up to ``count`` indices of a list, evenly spread from its first to its last element."""
    count = min(count, length)
    return sorted({int(index * (length - 1) / max(1, count - 1)) for index in range(count)})
