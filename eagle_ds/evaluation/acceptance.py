"""Acceptance length, measured: real speculative decoding of held-out prompts, drafts side by side against plain decoding.

Acceptance length is tokens gained per pass of the target, its own (bonus) token included: 1.0 is no gain at all. The prompt's
own pass is not counted. Every draft answers the same prompts, so the difference of two drafts is bootstrapped over prompts
in pairs.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from eagle_ds.capture.hf import load_model
from eagle_ds.config.recipe import Recipe
from eagle_ds.data.chat import ChatEncoder, Message, load_tokenizer, messages_of, record_id
from eagle_ds.data.conversations import ConversationFile
from eagle_ds.drafts.folder import DraftOnDisk
from eagle_ds.evaluation.decoding import (
    CachedDraft,
    CachedTarget,
    Decoded,
    DecodeSettings,
    Round,
    decode_plain,
    decode_speculative,
    prefill,
)
from eagle_ds.target.files import TargetInfo, resolve_target, stop_token_ids

log = logging.getLogger(__name__)

Turn = Literal["first", "last"]
RESAMPLES = 10_000
LEVEL = 0.95
CONTEXT_EDGES = (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 1 << 40)


@dataclass(frozen=True)
class Prompt:
    """What the target is served: token ids up to and including the generation prompt."""

    id: str
    ids: tuple[int, ...]


@dataclass
class PromptFile:
    """Prompts taken from conversations, and how many were passed over."""

    prompts: list[Prompt] = field(default_factory=list)
    too_long: int = 0
    unusable: int = 0


def load_prompts(path: str | Path, encoder: ChatEncoder, count: int, max_tokens: int, turn: Turn = "last") -> PromptFile:
    """The first ``count`` prompts of a conversation file that fit in ``max_tokens``.

    A conversation is cut before its last (first) assistant turn; of a text, the first half is the prompt. Raises ValueError
    if none is left.
    """
    found = PromptFile()
    for _, record in ConversationFile(Path(path)).records():
        if len(found.prompts) == count:
            break
        ids = _prompt_ids(record, encoder, turn)
        if not ids:
            found.unusable += 1
        elif len(ids) > max_tokens:
            found.too_long += 1
        else:
            found.prompts.append(Prompt(record_id(record), tuple(ids)))
    if not found.prompts:
        raise ValueError(
            f"{path} gives no prompt: {found.too_long} are longer than {max_tokens} tokens, {found.unusable} have nothing to answer; "
            "raise --max-prompt-tokens, or give other prompts"
        )
    return found


def _prompt_ids(record: Mapping[str, Any], encoder: ChatEncoder, turn: Turn) -> list[int]:
    if "text" in record:
        ids = encoder.tokenizer(str(record["text"]))["input_ids"]
        return ids[: len(ids) // 2]
    messages = messages_of(record)
    before = _messages_before(messages, turn)
    return encoder.prompt_ids(before) if before and before[-1]["role"] in ("user", "tool") else []


def _messages_before(messages: list[Message], turn: Turn) -> list[Message]:
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: answers[0 if turn == "first" else -1]] if answers else messages


@dataclass
class Measurement:
    """Answers to every prompt: by the target alone (None where that was not asked for), and with each draft."""

    settings: DecodeSettings
    prompts: list[Prompt]
    plain: list[Decoded] | None
    drafts: dict[str, list[Decoded]]

    def acceptance_length(self, name: str) -> float:
        """Tokens per pass of the target over all prompts."""
        return acceptance_length(rounds_of(self.drafts[name]))

    def summary(self) -> dict[str, Any]:
        """Everything that acceptance.json says about the drafts, their differences, and the prompts."""
        names = list(self.drafts)
        pairs = [(better, base) for i, base in enumerate(names) for better in names[i + 1 :]]
        return {
            "num_prompts": len(self.prompts),
            "max_new_tokens": self.settings.max_new_tokens,
            "num_draft_tokens": self.settings.num_draft_tokens,
            "plain": speed(self.plain) if self.plain else None,
            "drafts": [self._draft(name) for name in names],
            "differences": [
                {"draft": better, "baseline": base, **asdict(bootstrap(self.drafts[better], self.drafts[base]))} for better, base in pairs
            ],
            "prompts": [self._prompt(i) for i in range(len(self.prompts))],
        }

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
            diverged = [(i, answer.divergence) for i, answer in enumerate(answers) if answer.divergence]
            found["speedup"] = found["tokens_per_s"] / max(speed(self.plain)["tokens_per_s"], 1e-9)
            found["identical_answers"] = len(answers) - len(diverged)
            found["divergences"] = [{"prompt": self.prompts[i].id, **asdict(divergence)} for i, divergence in diverged]
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
    target: CachedTarget,
    drafts: Mapping[str, CachedDraft],
    prompts: Sequence[Prompt],
    settings: DecodeSettings,
    plain: bool = True,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Measurement:
    """Answer every prompt with every draft, and plainly if asked; the prompt is read once. ``progress`` is told new tokens."""
    found = Measurement(settings, list(prompts), [] if plain else None, {name: [] for name in drafts})
    for prompt in prompts:
        start = prefill(target, prompt.ids)
        reference = decode_plain(target, start, settings) if plain else None
        if reference:
            found.plain.append(reference)
            progress(len(reference.tokens))
        for name, draft in drafts.items():
            found.drafts[name].append(decode_speculative(target, draft, start, settings, reference))
            progress(len(found.drafts[name][-1].tokens))
    target.reset()
    return found


def rounds_of(answers: Sequence[Decoded]) -> list[Round]:
    """The target's passes over all answers."""
    return [one for answer in answers for one in answer.rounds]


def acceptance_length(rounds: Sequence[Round]) -> float:
    """Tokens gained per pass; 1.0 where there was none."""
    return sum(one.gained for one in rounds) / len(rounds) if rounds else 1.0


def by_position(rounds: Sequence[Round], num_draft_tokens: int) -> dict[str, list[float]]:
    """For each draft position: its acceptance among the passes that reached it, how often it was reached, and both together."""
    reached = [sum(one.reached > k for one in rounds) for k in range(num_draft_tokens)]
    accepted = [sum(one.accepted > k for one in rounds) for k in range(num_draft_tokens)]
    return {
        "acceptance_by_position": [a / r if r else 0.0 for a, r in zip(accepted, reached, strict=True)],
        "reached_by_position": reached,
        "cumulative_by_position": [a / max(len(rounds), 1) for a in accepted],
    }


def by_context(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """Acceptance length in each bucket of context length that has a pass; ``to`` is None for the last, open one."""
    buckets = []
    for low, high in zip(CONTEXT_EDGES[:-1], CONTEXT_EDGES[1:], strict=True):
        inside = [one for one in rounds if low <= one.context < high]
        if inside:
            to = high if high != CONTEXT_EDGES[-1] else None
            buckets.append({"from": low, "to": to, "passes": len(inside), "acceptance_length": acceptance_length(inside)})
    return buckets


def speed(answers: Sequence[Decoded]) -> dict[str, float]:
    """Decoding alone, the prompts' own pass left out on either side."""
    tokens, seconds = sum(len(answer.tokens) - 1 for answer in answers), sum(answer.seconds for answer in answers)
    return {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds if seconds else 0.0}


@dataclass(frozen=True)
class Interval:
    """A figure and its bootstrap interval."""

    value: float
    low: float
    high: float
    level: float = LEVEL
    resamples: int = RESAMPLES


def bootstrap(answers: Sequence[Decoded], baseline: Sequence[Decoded] | None = None, seed: int = 0) -> Interval:
    """Acceptance length, or its difference from ``baseline``'s on the same prompts, resampled over prompts (in pairs)."""
    counts = [_counts(answers)] + ([_counts(baseline)] if baseline is not None else [])
    draws = np.random.default_rng(seed).integers(0, len(answers), (RESAMPLES, len(answers)))
    resampled = [_ratio(gained[draws].sum(1), passes[draws].sum(1)) for gained, passes in counts]
    whole = [_ratio(gained.sum(keepdims=True), passes.sum(keepdims=True)) for gained, passes in counts]
    if baseline is not None:
        resampled, whole = [resampled[0] - resampled[1]], [whole[0] - whole[1]]
    low, high = np.quantile(resampled[0], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(whole[0][0]), float(low), float(high))


def _counts(answers: Sequence[Decoded]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens gained, passes) of each prompt."""
    return np.array([sum(r.gained for r in a.rounds) for a in answers], float), np.array([len(a.rounds) for a in answers], float)


def _ratio(gained: np.ndarray, passes: np.ndarray) -> np.ndarray:
    return np.where(passes > 0, gained / np.maximum(passes, 1), 1.0)


@dataclass(frozen=True)
class TargetFiles:
    """What decoding needs of a target beside its weights."""

    folder: Path
    info: TargetInfo
    encoder: ChatEncoder
    stop_ids: frozenset[int]

    @classmethod
    def open(cls, model: str, revision: str | None = None) -> TargetFiles:
        """Raises ValueError, one sentence, for a target or tokenizer that is missing or cannot be read."""
        folder = resolve_target(model, revision)
        info, tokenizer = TargetInfo.from_folder(folder), load_tokenizer(folder)
        stops = frozenset(stop_token_ids(folder)) or frozenset({tokenizer.eos_token_id})
        return cls(folder, info, ChatEncoder(tokenizer, info.max_position_embeddings), stops)

    def check_draft(self, draft: DraftOnDisk) -> None:
        """Raise ValueError if a draft was made for another size."""
        for name, stated in (("hidden_size", draft.arch.target_hidden_size), ("vocab_size", draft.arch.target_vocab_size)):
            if getattr(self.info, name) != stated:
                raise ValueError(f"draft {draft.folder} is for a target of {name} {stated}, but this one has {getattr(self.info, name)}")


@dataclass(frozen=True)
class LoadedTarget:
    """A target ready to decode, and the embedding that drafts of its width share."""

    files: TargetFiles
    cached: CachedTarget

    @classmethod
    def load(cls, files: TargetFiles, layers: Sequence[int], dtype: str, device: str) -> LoadedTarget:
        """``device`` ``auto``: cuda where there is one; ``split``: its layers over all GPUs. ValueError if it cannot be loaded."""
        loaded = load_model(files.folder, dtype, device)
        return cls(files, CachedTarget(loaded.requires_grad_(False).eval(), layers))

    @property
    def embedding(self) -> torch.Tensor:
        """[V, H]."""
        return self.cached.model.get_input_embeddings().weight

    def cache(self, draft: DraftOnDisk) -> CachedDraft:
        """A draft beside this target: same device, same type. Raises ValueError if it was made for another size."""
        self.files.check_draft(draft)
        return CachedDraft(draft.build(self.embedding, self.embedding.dtype, self.embedding.device), draft.vocab)


def measure_during_training(recipe: Recipe, draft: DraftOnDisk, device: torch.device, max_new_tokens: int = 64) -> dict[str, Any]:
    """A few held-out prompts, decoded with the draft as it stands: ``accept_length`` and acceptance by position, for eval.jsonl.

    Call it on one rank while the others wait. The target is loaded for the call and freed after it; on CPU it runs in float32.
    """
    assert recipe.data.eval_conversations is not None, "the recipe is validated: acceptance_interval needs eval_conversations"
    dtype = "float32" if device.type == "cpu" else recipe.target.dtype
    files = TargetFiles.open(recipe.target.model, recipe.target.revision)
    settings = DecodeSettings(max_new_tokens, recipe.training.ttt_steps, files.stop_ids)
    room = min(recipe.data.max_length, files.info.max_position_embeddings) - max_new_tokens
    found = load_prompts(recipe.data.eval_conversations, files.encoder, recipe.training.acceptance_prompts, room)
    target = LoadedTarget.load(files, recipe.target.aux_ids, dtype, str(device))
    measured = measure(target.cached, {"draft": target.cache(draft)}, found.prompts, settings, plain=False)
    rounds = rounds_of(measured.drafts["draft"])
    del target, measured
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    positions = by_position(rounds, settings.num_draft_tokens)["acceptance_by_position"]
    return {"accept_length": acceptance_length(rounds), "accept_by_position": positions, "accept_passes": len(rounds)}
