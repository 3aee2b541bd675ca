"""Measure acceptance length by speculative decoding of held-out prompts, with one or more drafts and without.

Acceptance length is the number of tokens gained per pass of the target, including its own (bonus) token: 1.0
means no gain. The pass that reads the prompt is not counted. Every draft answers the same prompts, so the
difference between two drafts is bootstrapped over pairs of answers to the same prompt.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from eagle_ds.capture.hf import load_model
from eagle_ds.config.recipe import Recipe
from eagle_ds.data.chat import ChatEncoder, load_tokenizer
from eagle_ds.data.conversations import ConversationFile, Intake
from eagle_ds.data.shapes import BadRecord, conversation_of
from eagle_ds.drafts.cached_draft import CachedDraft
from eagle_ds.drafts.loading import DraftOnDisk
from eagle_ds.evaluation import decoding
from eagle_ds.evaluation.batched import BatchDecoder
from eagle_ds.evaluation.decoding import CachedTarget, Decoded, DecodeSettings, Round
from eagle_ds.target.files import resolve_target
from eagle_ds.target.info import TargetInfo, stop_token_ids

Turn = Literal["first", "last"]
Progress = Callable[[int], None]  # called with a number of new tokens
RESAMPLES = 10_000
LEVEL = 0.95
# Without cuDNN's attention, which makes a plan for every new shape. Decoding meets a new shape in every pass.
# With cuDNN, the draft that was measured first on a GPU was slower by 3.4 to 3.9 times, in either order; its
# plans, which the second draft used again, are the likely cause. Speeds without cuDNN are not measured yet.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
WARM_UP_PASSES = 2
CONTEXT_EDGES = (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 1 << 40)


@dataclass(frozen=True)
class Prompt:
    """A prompt for the target: token ids up to and including the generation prompt."""

    id: str
    ids: tuple[int, ...]


@dataclass
class PromptFile:
    """Prompts taken from conversations, and how many conversations were skipped."""

    prompts: list[Prompt] = field(default_factory=list)
    too_long: int = 0
    unusable: int = 0
    intake: Intake = field(default_factory=lambda: Intake(strict=False))  # conversations that are rejected


def load_prompts(
    path: str | Path, encoder: ChatEncoder, count: int, max_tokens: int, turn: Turn = "last",
    intake: Intake | None = None,
) -> PromptFile:
    """Return the first ``count`` prompts of a conversation file that fit in ``max_tokens``.

    The prompt of a conversation ends before its last (or first) assistant turn. The prompt of a text is its
    first half. A record that cannot be used is rejected, as ``intake`` says; by default, it is skipped.

    Raises ValueError if no prompt is found.
    """
    found, file = PromptFile(intake=intake or Intake(strict=False)), ConversationFile(Path(path))
    for offset, name, record in file.unique_records(found.intake):
        if len(found.prompts) == count:
            break
        try:
            ids = _prompt_ids(record, encoder, turn)
        except BadRecord as error:
            found.intake.reject(file, file.line_numbers[offset], name, error)
            continue
        if not ids:
            found.unusable += 1
        elif len(ids) > max_tokens:
            found.too_long += 1
        else:
            found.prompts.append(Prompt(name, tuple(ids)))
    if not found.prompts:
        counts = (
            (found.too_long, f"are longer than {max_tokens} tokens"),
            (found.unusable, "have nothing to answer"),
            (len(found.intake.rejected), "are rejected"),
        )
        why = [f"{count} {what}" for count, what in counts if count]
        raise ValueError(
            f"{path} has no usable prompt: {', '.join(why) or 'it is empty'}; "
            f"{'raise --max-prompt-tokens, or ' if found.too_long else ''}give other prompts"
        )
    return found


def _prompt_ids(record: Mapping[str, Any], encoder: ChatEncoder, turn: Turn) -> list[int]:
    conversation = conversation_of(record)
    if conversation.text is not None:
        ids = encoder.tokenizer(conversation.text)["input_ids"]
        return ids[: len(ids) // 2]
    messages = conversation.messages
    # The prompt ends before the answer to be decoded; without an answer, all messages are the prompt.
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if answers:
        messages = messages[: answers[0 if turn == "first" else -1]]
    asks = bool(messages) and messages[-1]["role"] in ("user", "tool")
    return encoder.prompt_ids(messages, conversation.tools) if asks else []


@dataclass
class Measurement:
    """Answers to every prompt: by the target alone (``plain``; None if not measured) and with each draft."""

    settings: DecodeSettings
    prompts: list[Prompt]
    plain: list[Decoded] | None
    drafts: dict[str, list[Decoded]]

    @classmethod
    def join(
        cls, settings: DecodeSettings, prompts: Sequence[Prompt], parts: Sequence[Measurement]
    ) -> Measurement:
        """Join measurements of one prompt each, in the order of the prompts."""
        names = parts[0].drafts if parts else ()
        plain = [one.plain[0] for one in parts if one.plain]
        drafts = {name: [one.drafts[name][0] for one in parts] for name in names}
        return cls(settings, list(prompts), plain or None, drafts)

    def split(self) -> list[Measurement]:
        """Return one measurement for each prompt: the inverse of ``join``."""
        parts = []
        for i, prompt in enumerate(self.prompts):
            plain = self.plain[i : i + 1] if self.plain else None
            drafts = {name: answers[i : i + 1] for name, answers in self.drafts.items()}
            parts.append(Measurement(self.settings, [prompt], plain, drafts))
        return parts

    def summary(self) -> dict[str, Any]:
        """Return the part of acceptance.json about the drafts, their differences and the prompts."""
        names = list(self.drafts)
        return {
            "num_prompts": len(self.prompts),
            "max_new_tokens": self.settings.max_new_tokens,
            "num_draft_tokens": self.settings.num_draft_tokens,
            "plain": speed(self.plain) if self.plain else None,
            "drafts": [self._draft(name) for name in names],
            "differences": [self._difference(b, a) for i, a in enumerate(names) for b in names[i + 1 :]],
            "prompts": [self._prompt(i) for i in range(len(self.prompts))],
        }

    def _difference(self, draft: str, baseline: str) -> dict[str, Any]:
        interval = bootstrap(self.drafts[draft], self.drafts[baseline])
        return {"draft": draft, "baseline": baseline, **asdict(interval)}

    def _draft(self, name: str) -> dict[str, Any]:
        answers = self.drafts[name]
        rounds = rounds_of(answers)
        found = {
            "name": name,
            "acceptance_length": acceptance_length(rounds),
            "interval": asdict(bootstrap(answers)),
            "passes": len(rounds),
            **by_position(rounds, self.settings.num_draft_tokens),
            "by_context": by_context(rounds),
            **speed(answers),
        }
        if self.plain:
            # In float32 every answer should equal plain decoding; in bfloat16 near ties may differ.
            diverged = [(i, answer.divergence) for i, answer in enumerate(answers) if answer.divergence]
            found["speedup"] = found["tokens_per_s"] / max(speed(self.plain)["tokens_per_s"], 1e-9)
            found["identical_answers"] = len(answers) - len(diverged)
            found["divergences"] = [{"prompt": self.prompts[i].id, **asdict(where)} for i, where in diverged]
        return found

    def _prompt(self, i: int) -> dict[str, Any]:
        rounds = {name: rounds_of(answers[i : i + 1]) for name, answers in self.drafts.items()}
        return {
            "id": self.prompts[i].id,
            "prompt_tokens": len(self.prompts[i].ids),
            "new_tokens": {name: len(answers[i].tokens) for name, answers in self.drafts.items()},
            "passes": {name: len(of_prompt) for name, of_prompt in rounds.items()},
            "gained": {name: sum(r.gained for r in of_prompt) for name, of_prompt in rounds.items()},
        }


def measure(
    target: CachedTarget, drafts: Mapping[str, CachedDraft], prompts: Sequence[Prompt],
    settings: DecodeSettings, plain: bool = True, progress: Progress = lambda tokens: None, batch: int = 1,
) -> Measurement:
    """Answer every prompt with every draft and, if ``plain``, by the target alone.

    The prompt is read once and shared by all. ``batch`` prompts of similar length are decoded together.
    ``progress`` is called with the number of new tokens.

    Speeds are comparable only after ``warm_up``.
    """
    found: dict[int, Measurement] = {}
    for indices in batches_of(prompts, batch):
        answered = _answer(target, drafts, [prompts[i] for i in indices], settings, plain, progress)
        found |= dict(zip(indices, answered, strict=True))
    target.reset()
    return Measurement.join(settings, prompts, [found[i] for i in range(len(prompts))])


def batches_of(prompts: Sequence[Prompt], batch: int) -> list[list[int]]:
    """Split the prompts into batches of similar length; return their indices, the longest prompts first."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
    return [order[at : at + batch] for at in range(0, len(order), batch)]


def warm_up(
    target: CachedTarget, drafts: Mapping[str, CachedDraft], prompts: Sequence[Prompt],
    settings: DecodeSettings, batch: int = 1,
) -> None:
    """Decode a few tokens in every way that is timed later, without timing them.

    The first passes of a process compile kernels and allocate memory. Without this, the way that is measured
    first would pay for it.
    """
    few = WARM_UP_PASSES * (settings.num_draft_tokens + 1)
    short = replace(settings, max_new_tokens=min(few, settings.max_new_tokens), stop_ids=frozenset())
    first = [prompts[i] for i in batches_of(prompts, batch)[0]]
    _answer(target, drafts, first, short, plain=True, progress=lambda tokens: None)
    target.reset()


def _answer(
    target: CachedTarget, drafts: Mapping[str, CachedDraft], prompts: Sequence[Prompt],
    settings: DecodeSettings, plain: bool, progress: Progress,
) -> list[Measurement]:
    """Answer one batch of prompts; return one measurement for each."""
    decoder: decoding.PromptDecoder | BatchDecoder
    answers: dict[str, list[Decoded]] = {}
    with sdpa_kernel(ATTENTION):
        if len(prompts) == 1:
            decoder = decoding.PromptDecoder(target, prompts[0].ids, settings)
        else:
            decoder = BatchDecoder(target, [prompt.ids for prompt in prompts], settings)
        reference = decoder.plain() if plain else None
        if reference:
            progress(sum(len(answer.tokens) for answer in reference))
        for name, draft in drafts.items():
            answers[name] = decoder.speculative(draft, reference)
            progress(sum(len(answer.tokens) for answer in answers[name]))
    return Measurement(settings, list(prompts), reference, answers).split()


def rounds_of(answers: Sequence[Decoded]) -> list[Round]:
    """Return the target's passes of all answers."""
    return [one for answer in answers for one in answer.rounds]


def acceptance_length(rounds: Sequence[Round]) -> float:
    """Return the tokens gained per pass; 1.0 if there was no pass."""
    return sum(one.gained for one in rounds) / len(rounds) if rounds else 1.0


def by_position(rounds: Sequence[Round], num_draft_tokens: int) -> dict[str, list[float]]:
    """Return by draft position: acceptance if reached, passes that reached it, and acceptance over all
    passes.
    """
    reached = [sum(one.reached > k for one in rounds) for k in range(num_draft_tokens)]
    accepted = [sum(one.accepted > k for one in rounds) for k in range(num_draft_tokens)]
    return {
        "acceptance_by_position": [a / r if r else 0.0 for a, r in zip(accepted, reached, strict=True)],
        "reached_by_position": reached,
        "cumulative_by_position": [a / max(len(rounds), 1) for a in accepted],
    }


def by_context(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """Return the acceptance length by context length. ``to`` is None for the last, open bucket."""
    buckets = []
    for low, high in zip(CONTEXT_EDGES[:-1], CONTEXT_EDGES[1:], strict=True):
        inside = [one for one in rounds if low <= one.context < high]
        if inside:
            to = high if high != CONTEXT_EDGES[-1] else None
            length = acceptance_length(inside)
            buckets.append({"from": low, "to": to, "passes": len(inside), "acceptance_length": length})
    return buckets


def speed(answers: Sequence[Decoded]) -> dict[str, float]:
    """Return the speed of decoding, without the passes that read the prompts."""
    tokens = sum(len(answer.tokens) - 1 for answer in answers)
    seconds = sum(answer.seconds for answer in answers)
    return {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds if seconds else 0.0}


@dataclass(frozen=True)
class Interval:
    """A value with its bootstrap interval."""

    value: float
    low: float
    high: float
    level: float = LEVEL
    resamples: int = RESAMPLES


def bootstrap(answers: Sequence[Decoded], baseline: Sequence[Decoded] | None = None) -> Interval:
    """Bootstrap the acceptance length, or its difference from ``baseline``'s, over prompts.

    Both lists answer the same prompts. Each resample draws the same prompts for both, so the interval of the
    difference is a paired one.
    """
    def lengths(prompts: np.ndarray) -> np.ndarray:
        return _lengths(answers, prompts) - (0.0 if baseline is None else _lengths(baseline, prompts))

    count = len(answers)
    # Each row of draws is one resample: indices of prompts, drawn with replacement.
    draws = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    low, high = np.quantile(lengths(draws), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(lengths(np.arange(count)[None])[0]), float(low), float(high))


def _lengths(answers: Sequence[Decoded], prompts: np.ndarray) -> np.ndarray:
    """Return the acceptance length over each row of ``prompts`` [resamples, prompts], which holds indices."""
    gained = np.array([sum(r.gained for r in answer.rounds) for answer in answers], float)[prompts].sum(1)
    passes = np.array([len(answer.rounds) for answer in answers], float)[prompts].sum(1)
    return np.where(passes > 0, gained / np.maximum(passes, 1), 1.0)


@dataclass(frozen=True)
class TargetFiles:
    """The parts of a target that decoding needs, except its weights."""

    folder: Path
    info: TargetInfo
    encoder: ChatEncoder
    stop_ids: frozenset[int]

    @classmethod
    def open(
        cls, model: str, revision: str | None = None, template_kwargs: Mapping[str, Any] | None = None, *,
        weights: bool = True,
    ) -> TargetFiles:
        """Find the target and load its tokenizer. Raises ValueError if either cannot be read.

        ``weights``: download and check its weights too.
        """
        folder = resolve_target(model, revision, weights)
        info, tokenizer = TargetInfo.from_folder(folder), load_tokenizer(folder)
        stops = frozenset(stop_token_ids(folder)) or frozenset({tokenizer.eos_token_id})
        encoder = ChatEncoder(tokenizer, info.max_position_embeddings, template_kwargs=template_kwargs)
        return cls(folder, info, encoder, stops)


@dataclass(frozen=True)
class LoadedTarget:
    """A target ready to decode. Drafts of the same width share its embedding."""

    files: TargetFiles
    cached: CachedTarget

    @classmethod
    def load(cls, files: TargetFiles, layers: Sequence[int], dtype: str, device: str) -> LoadedTarget:
        """Load the target's weights.

        ``device`` "auto" means a GPU if there is one, "split" spreads the layers over all GPUs. Raises
        ValueError if the target cannot be loaded.
        """
        loaded = load_model(files.folder, dtype, device)
        return cls(files, CachedTarget(loaded.requires_grad_(False).eval(), layers))

    def cache(self, draft: DraftOnDisk) -> CachedDraft:
        """Build a draft on this target's device in its dtype. Raises ValueError if their sizes differ."""
        draft.check_target(self.files.info, self.files.folder)
        embedding = self.cached.model.get_input_embeddings().weight  # [V, H]
        return CachedDraft(draft.build(embedding, embedding.dtype, embedding.device), draft.vocab)


def measure_during_training(
    recipe: Recipe, draft: DraftOnDisk, device: torch.device, max_new_tokens: int = 64
) -> dict[str, Any]:
    """Decode a few held-out prompts with the draft as it is now.

    Call it on one rank while the others wait. The target is loaded for the call and freed after it. On CPU it
    runs in float32.

    Returns:
        ``accept_length``, ``accept_by_position`` and ``accept_passes``, for eval.jsonl.
    """
    conversations = recipe.data.eval_conversations
    assert conversations is not None, "recipe validation: acceptance_interval needs eval_conversations"
    dtype = "float32" if device.type == "cpu" else recipe.target.dtype
    stated = recipe.target
    files = TargetFiles.open(stated.model, stated.revision, stated.template_kwargs)
    settings = DecodeSettings(max_new_tokens, recipe.training.ttt_steps, files.stop_ids)
    max_tokens = min(recipe.data.max_length, files.info.max_position_embeddings) - max_new_tokens
    found = load_prompts(conversations, files.encoder, recipe.training.acceptance_prompts, max_tokens)
    target = LoadedTarget.load(files, recipe.target.aux_ids, dtype, str(device))
    measured = measure(target.cached, {"draft": target.cache(draft)}, found.prompts, settings, plain=False)
    rounds = rounds_of(measured.drafts["draft"])
    del target, measured
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    positions = by_position(rounds, settings.num_draft_tokens)["acceptance_by_position"]
    return {
        "accept_length": acceptance_length(rounds),
        "accept_by_position": positions, "accept_passes": len(rounds)
    }
