"""Build small samples and stores, and compare what is read with what was written."""

from __future__ import annotations

from pathlib import Path

import torch

from eagle_ds.store.format import SMALL_DTYPES, TORCH_DTYPES, WIDE_NAMES, raw_view
from eagle_ds.store.reader import ReadStats, SampleReader
from eagle_ds.store.store import Sample, Store, StoreInfo, StoreWriter

VOCAB = 1000


def inflated_per_used(stats: ReadStats) -> float:
    """Inflated / requested bytes: 1.0 means that nothing was inflated in vain."""
    return stats.bytes_inflated / max(1, stats.bytes_used)


def make_info(
    hidden_size: int = 8, num_aux: int = 3, dtype: str = "bfloat16", target: str = "some/target"
) -> StoreInfo:
    return StoreInfo(
        target, "target-hash", "tokenizer-hash", hidden_size, tuple(range(num_aux)), VOCAB, dtype=dtype
    )


def make_sample(name: str, num_tokens: int, info: StoreInfo, seed: int = 0, labels: bool = True) -> Sample:
    """Make a sample whose hidden states are random bits, with NaN payloads, denormals and negative zeros."""
    generator = torch.Generator().manual_seed(seed)
    dtype = TORCH_DTYPES[info.dtype]

    def bits(width: int) -> torch.Tensor:
        raw = torch.randint(
            0, 256, (num_tokens, width * dtype.itemsize), generator=generator, dtype=torch.uint8
        )
        return raw.view(dtype)

    def integers(top: int, kind: torch.dtype) -> torch.Tensor:
        return torch.randint(0, top, (num_tokens,), generator=generator, dtype=kind)

    return Sample(
        name,
        input_ids=integers(VOCAB, torch.int32),
        loss_mask=integers(2, torch.uint8),
        aux_hidden_state=bits(len(info.aux_layer_ids) * info.hidden_size),
        hidden_state=bits(info.hidden_size),
        target_token_id=integers(VOCAB, torch.int32) if labels else None,
        target_logsumexp=torch.randn(num_tokens, generator=generator) if labels else None,
    )


def write_store(root: Path, info: StoreInfo, *samples: Sample) -> Store:
    """Write ``samples`` to a store and open it."""
    with StoreWriter(root, info) as writer:
        for sample in samples:
            writer.add(sample)
    return Store(root)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Compare bit for bit, so equal NaNs are equal."""
    return (
        ours.dtype == theirs.dtype
        and ours.shape == theirs.shape
        and bool((raw_view(ours) == raw_view(theirs)).all())
    )


def assert_stored(reader: SampleReader, sample: Sample) -> None:
    """Check that ``reader`` returns ``sample``, bit for bit."""
    with reader:
        for name in SMALL_DTYPES:
            ours, theirs = getattr(sample, name), reader.read_small(name)
            assert (ours is None) == (theirs is None), name
            assert ours is None or torch.equal(ours, theirs), name
        for name in WIDE_NAMES:
            assert same_bits(getattr(sample, name), reader.read_rows(name, [(0, sample.num_tokens)])), name
        assert reader.header.id == sample.id
