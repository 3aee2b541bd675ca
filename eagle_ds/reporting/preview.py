"""Look at conversations as training will see them, before GPU-hours are spent on their hidden states.

`preview` reads a whole file as a capture does and counts; some conversations are kept to be shown. The shown
text is decoded from the tokens, so it is exactly what the target will read.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from eagle_ds.config.recipe import Recipe
from eagle_ds.data.chat import ChatEncoder, EncodedSample, EncodeStats, load_tokenizer
from eagle_ds.data.conversations import ConversationFile, Intake
from eagle_ds.data.vocab import build_vocab_map, count_trained_tokens, covered_share
from eagle_ds.target.files import resolve_target
from eagle_ds.target.info import TargetInfo

DRAFT_VOCABULARY = 32000  # tokens; the usual size


@dataclass(frozen=True)
class PreviewJob:
    """What to look at."""

    conversations: Path
    target: str
    revision: str | None = None
    max_length: int | None = None  # None: samples of any length
    overlong: Literal["truncate", "skip"] = "truncate"
    duplicates: Literal["reject", "suffix"] = "reject"
    vocab_size: int | None = None  # of the draft; None: 32000, or the target's if that is smaller
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    show: int = 3

    @staticmethod
    def values_of(recipe: Recipe) -> dict[str, Any]:
        """Return the fields that a recipe decides. A recipe without conversations does not decide those."""
        data, target = recipe.data, recipe.target
        values = {
            "target": target.model, "revision": target.revision, "template_kwargs": target.template_kwargs,
            "max_length": data.max_length, "overlong": data.overlong, "duplicates": data.duplicates,
            "vocab_size": recipe.draft.vocab_size,
        }
        return values | ({"conversations": Path(data.conversations)} if data.conversations else {})


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a conversation that are all trained or all untrained, all kept or all cut off."""

    text: str
    num_tokens: int
    trained: bool
    kept: bool  # False: behind max_length


@dataclass(frozen=True)
class Shown:
    """A conversation to show: its name in the file, its pieces in order, and its counts of tokens."""

    name: str
    pieces: list[Piece]

    def count(self, *, kept: bool, trained: bool | None = None) -> int:
        """Return the number of tokens; of trained or untrained ones only, if ``trained`` says so."""
        chosen = (piece for piece in self.pieces if piece.kept == kept and trained in (None, piece.trained))
        return sum(piece.num_tokens for piece in chosen)


@dataclass(frozen=True)
class Overlong:
    """A conversation that is longer than ``max_length``."""

    name: str
    num_tokens: int
    trained_lost: int  # trained tokens behind max_length; all of them where the sample is skipped
    skipped: bool  # by overlong "skip", or because no trained token is left


@dataclass
class Preview:
    """What a capture of the file would train on."""

    job: PreviewJob
    vocab_size: int  # of the draft
    shown: list[Shown] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # tokens of every sample, before max_length
    overlong: list[Overlong] = field(default_factory=list)
    skipped_lines: list[int] = field(default_factory=list)  # without an answer, or repeated
    records: int = 0  # lines that are not blank
    seconds: float = 0.0  # to read, render, tokenize and count them
    used: int = 0  # samples that training gets
    used_tokens: int = 0
    trained_tokens: int = 0
    distinct_tokens: int = 0  # different token ids among the trained ones
    coverage: dict[int, float] = field(default_factory=dict)  # draft vocabulary size -> covered share
    stats: EncodeStats = field(default_factory=EncodeStats)  # before max_length
    intake: Intake = field(default_factory=Intake)

    @property
    def trained_share(self) -> float:
        """Trained tokens / all tokens of the samples that training gets."""
        return self.trained_tokens / max(1, self.used_tokens)

    @property
    def reasons(self) -> Counter[str]:
        """How many records were rejected for each reason."""
        return Counter(rejected.reason for rejected in self.intake.rejected)


def preview(job: PreviewJob) -> Preview:
    """Read the whole file and count what a capture would train on. Writes nothing.

    Raises:
        ValueError: the target, the file or a setting is wrong. A bad record is rejected and counted instead.
    """
    for setting, value, least in (("max_length", job.max_length, 1), ("show", job.show, 0)):
        if value is not None and value < least:
            raise ValueError(f"{setting} {value} is out of range; give {least} or more")
    folder = resolve_target(job.target, job.revision, weights=False)
    target_vocab = TargetInfo.from_folder(folder).vocab_size
    size = job.vocab_size if job.vocab_size is not None else min(DRAFT_VOCABULARY, target_vocab)
    if not 1 <= size <= target_vocab:
        wrong = f"a draft vocabulary of {size} tokens is out of range"
        raise ValueError(f"{wrong}; give 1 to {target_vocab}, the target's")
    # Without a limit: truncation is shown here, so the tokens behind max_length are needed.
    encoder = ChatEncoder(load_tokenizer(folder), sys.maxsize, template_kwargs=job.template_kwargs)
    intake = Intake(strict=False, duplicates=job.duplicates)
    found, begin = Preview(job, size, stats=encoder.stats, intake=intake), time.perf_counter()
    counts = count_trained_tokens(_used_samples(found, encoder), target_vocab)
    found.seconds = time.perf_counter() - begin
    found.distinct_tokens = int((counts > 0).sum())
    for other in (size // 4, size // 2, size, 2 * size):
        if 1 <= other <= target_vocab:
            found.coverage[other] = covered_share(counts, build_vocab_map(counts, other))
    return found


def _used_samples(found: Preview, encoder: ChatEncoder) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (input_ids, loss_mask) of every sample that training gets, and count all samples in ``found``."""
    file, encoded = ConversationFile(found.job.conversations), set()
    for offset, sample in file.encode(encoder, found.intake):
        encoded.add(file.line_numbers[offset])
        name = f"{sample.id} ({file.unit} {file.line_numbers[offset]})"
        if len(found.shown) < found.job.show:
            found.shown.append(Shown(name, pieces_of(sample, found.job.max_length, encoder.tokenizer)))
        found.lengths.append(len(sample.input_ids))
        kept = sample.loss_mask[: found.job.max_length]
        if len(kept) < len(sample.loss_mask):
            trained, left = int(sample.loss_mask.sum()), int(kept.sum())
            skipped = found.job.overlong == "skip" or not left
            lost = trained if skipped else trained - left
            found.overlong.append(Overlong(name, len(sample.loss_mask), lost, skipped))
            if skipped:
                continue
        found.used += 1
        found.used_tokens += len(kept)
        found.trained_tokens += int(kept.sum())
        yield torch.from_numpy(sample.input_ids[: len(kept)]), torch.from_numpy(kept)
    found.records = len(file.line_numbers)
    explained = encoded | {rejected.line for rejected in found.intake.rejected}
    found.skipped_lines += [line for line in file.line_numbers.values() if line not in explained]


def pieces_of(sample: EncodedSample, max_length: int | None, tokenizer: Any) -> list[Piece]:
    """Split a sample where training begins, ends, or is cut off, and decode each piece."""
    mask, size = sample.loss_mask, len(sample.loss_mask)
    limit = size if max_length is None else min(max_length, size)
    borders = {0, limit, size, *(np.flatnonzero(np.diff(mask)) + 1).tolist()}
    pieces, before = [], ""
    ordered = sorted(borders)
    for start, end in zip(ordered, ordered[1:], strict=False):
        # Some tokenizers (SentencePiece) drop the space before the first token of what they decode. So decode
        # from the beginning each time; only where a character spans the border, decode the piece alone.
        text = tokenizer.decode(sample.input_ids[:end], clean_up_tokenization_spaces=False)
        own = text[len(before) :]
        if not text.startswith(before):
            own = tokenizer.decode(sample.input_ids[start:end], clean_up_tokenization_spaces=False)
        pieces.append(Piece(own, end - start, bool(mask[start]), start < limit))
        before = text
    return pieces
