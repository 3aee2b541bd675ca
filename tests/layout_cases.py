"""Random training problems, small enough to be checked against the dense reference under every layout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from eagle_ds.data.batch import TokenLabels
from eagle_ds.model.arch import DraftArch
from eagle_ds.model.draft import Eagle3Draft
from eagle_ds.model.loss import step_decays
from eagle_ds.sharding.sequence import Document, SequenceSharding, shard_sequence
from tests.micro_batch import WholeHead, WholeSequence
from tests.plain_reference import ReferenceSums, document_sums

TINY = DraftArch(
    hidden_size=24,
    intermediate_size=20,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=4,
    draft_vocab_size=19,
    target_hidden_size=24,
    target_vocab_size=37,
    trained_length=128,
    rope_theta=100.0,
)
DECAY = 0.8


@dataclass(frozen=True)
class Case:
    """One global batch. ``sequences[dp_rank]`` is a pack: a loss mask (0s and 1s) for each document."""

    sequences: tuple[tuple[str, ...], ...]
    arch: DraftArch = TINY
    ulysses: int = 1
    ring: int = 1
    ring_mode: str = "gather"
    trained_rows_only: bool = True
    alignment: str = "serving"
    steps: int = 4
    kind: str = "kl"
    seed: int = 0
    dtype: str = "float64"
    device: str = "cpu"
    recompute: str = "none"

    @property
    def world(self) -> int:
        return len(self.sequences) * self.ulysses * self.ring

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def alone(self) -> Case:
        """The same problem with layout 1 x 1."""
        return replace(self, ulysses=1, ring=1)

    def sharding(self, dp_rank: int) -> SequenceSharding:
        return shard_sequence(
            [document(mask) for mask in self.sequences[dp_rank]],
            ulysses=self.ulysses,
            ring=self.ring,
            ring_mode=self.ring_mode,
            ttt_steps=self.steps,
            alignment=self.alignment,
            trained_rows_only=self.trained_rows_only,
        )

    def model(self) -> Eagle3Draft:
        torch.manual_seed(self.seed)
        model = Eagle3Draft(self.arch).double()
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
        model.embed_tokens.weight.data.normal_()
        return model.to(self.torch_dtype)

    def whole(self, dp_rank: int) -> WholeSequence:
        rng = np.random.default_rng([self.seed, dp_rank])
        sizes = [len(mask) for mask in self.sequences[dp_rank]]
        info = [
            TokenLabels(rng.integers(0, self.arch.target_vocab_size, n, dtype=np.int32), mask_array(mask))
            for n, mask in zip(sizes, self.sequences[dp_rank], strict=True)
        ]
        width = self.arch.target_hidden_size
        widths = (self.arch.num_aux * width, width)
        aux, hidden = (
            torch.from_numpy(rng.standard_normal((sum(sizes), w))).to(self.torch_dtype) for w in widths
        )
        return WholeSequence(info, aux, hidden)

    def head(self) -> WholeHead:
        rng = np.random.default_rng(self.seed + 1)
        shape = (self.arch.target_vocab_size, self.arch.target_hidden_size)
        full = torch.from_numpy(rng.standard_normal(shape)).to(self.torch_dtype)
        kept = np.sort(rng.choice(self.arch.target_vocab_size, self.arch.draft_vocab_size, replace=False))
        t2d = torch.zeros(self.arch.target_vocab_size, dtype=torch.bool)
        t2d[kept] = True
        return WholeHead(full[t2d], t2d, torch.from_numpy(kept - np.arange(len(kept))), full)


def mask_array(mask: str) -> np.ndarray:
    return np.array([c == "1" for c in mask], dtype=np.uint8)


def document(mask: str) -> Document:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask_array(mask).astype(np.int64), [0]])))
    return Document(len(mask), tuple((int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)))


def reference_step(case: Case) -> tuple[Tensor, ReferenceSums, dict[str, Tensor]]:
    """Return loss, sums and the gradient of every parameter for the global batch, by the dense reference.

    Computed in float64, from values rounded to the case's dtype.
    """
    model, head = case.model(), case.head()
    head = replace(head, full=head.full.double(), draft_rows=head.draft_rows.double())
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    lookup = {"embed_tokens.weight": model.embed_tokens.weight.detach().double(), **weights}
    mix = torch.ones(case.steps, dtype=torch.float64)
    sums = _all_documents(case, lookup, head, mix)
    counted = sums.counted.clamp(min=1)
    if case.kind == "lambda":  # w follows from the mean alpha, which no weight of the loss changes
        sums = _all_documents(case, lookup, head, torch.exp(-3.0 * sums.alpha / counted))
    loss = (step_decays(DECAY, case.steps) * sums.loss / counted).sum()
    names = list(weights)
    grads = torch.autograd.grad(loss, [weights[n] for n in names], allow_unused=True)
    found = {n: torch.zeros_like(weights[n]) if g is None else g for n, g in zip(names, grads, strict=True)}
    return loss.detach(), sums, found


def _all_documents(case: Case, weights: dict[str, Tensor], head: WholeHead, mix: Tensor) -> ReferenceSums:
    parts = []
    for dp_rank, masks in enumerate(case.sequences):
        whole, start = case.whole(dp_rank), 0
        for info, mask in zip(whole.info, masks, strict=True):
            rows = slice(start, start + len(mask))
            ids = torch.from_numpy(info.input_ids.astype(np.int64))
            parts.append(
                document_sums(
                    weights,
                    case.arch,
                    head.full,
                    head.t2d,
                    ids,
                    mask_array(mask),
                    whole.aux[rows].double(),
                    whole.hidden[rows].double(),
                    case.steps,
                    case.alignment,
                    case.kind,
                    mix,
                )
            )
            start += len(mask)
    names = ReferenceSums.__dataclass_fields__
    return ReferenceSums(**{name: torch.stack([getattr(p, name) for p in parts]).sum(0) for name in names})
