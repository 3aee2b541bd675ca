"""acceptance.json agrees with the rounds; intervals are over prompts; skipped prompts are counted."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from eagle_ds.config.recipe import Recipe
from eagle_ds.data.chat import ChatEncoder
from eagle_ds.data.conversations import Intake
from eagle_ds.drafts.cached_draft import CachedDraft
from eagle_ds.drafts.loading import untrained_draft
from eagle_ds.evaluation import acceptance
from eagle_ds.evaluation.acceptance import (
    Measurement,
    Prompt,
    acceptance_length,
    bootstrap,
    by_context,
    by_position,
    load_prompts,
    rounds_of,
)
from eagle_ds.evaluation.batched import BatchedDraft
from eagle_ds.evaluation.decoding import CachedTarget, Decoded, DecodeSettings, Divergence, Round
from eagle_ds.evaluation.decoding_pool import DecodingJob, measure_job
from eagle_ds.target.files import load_target_weights
from tests.draft_cases import PLAIN, random_draft, recipe_for
from tests.tiny_targets import byte_tokenizer, save_tiny_llama

ROUNDS = [Round(100, 1, 0, 1), Round(101, 3, 2, 3), Round(300, 3, 3, 4), Round(304, 2, 1, 2)]


def answer(gains: list[int], **fields: Any) -> Decoded:
    rounds = [Round(10 + i, min(gain, 3), gain - 1, gain) for i, gain in enumerate(gains)]
    return Decoded([0] * (1 + sum(gains)), seconds=0.5 * len(gains), rounds=rounds, **fields)


def test_acceptance_is_counted_per_pass_position_and_context() -> None:
    assert acceptance_length(ROUNDS) == 2.5
    found = by_position(ROUNDS, 3)
    assert found["reached_by_position"] == [4, 3, 2]
    assert found["acceptance_by_position"] == [3 / 4, 2 / 3, 1 / 2]
    assert found["cumulative_by_position"] == [3 / 4, 2 / 4, 1 / 4]
    assert [(b["from"], b["to"], b["passes"], b["acceptance_length"]) for b in by_context(ROUNDS)] == [
        (0, 256, 2, 2.0), (256, 512, 2, 3.0)
    ]


def test_acceptance_length_is_one_plus_the_cumulative_acceptance() -> None:
    assert acceptance_length(ROUNDS) == 1 + sum(by_position(ROUNDS, 3)["cumulative_by_position"])


def test_without_a_pass_the_acceptance_length_is_one() -> None:
    assert acceptance_length([]) == 1.0 and by_context([]) == []
    assert bootstrap([Decoded([1]), Decoded([1])]).value == 1.0


def test_the_interval_is_paired_by_prompt() -> None:
    base = [answer([gain] * 4) for gain in (1, 1, 2, 3, 4, 4)]
    better = [answer([gain + 1] * 4) for gain in (1, 1, 2, 3, 4, 4)]
    alone, difference = bootstrap(better), bootstrap(better, base)
    # each prompt gains exactly one
    assert (difference.value, difference.low, difference.high) == pytest.approx((1.0, 1.0, 1.0))
    assert alone.low < alone.value < alone.high
    same = bootstrap(base, base)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    assert bootstrap(better, base) == difference


def test_a_summary_holds_drafts_differences_prompts_and_divergences() -> None:
    gone = Divergence(3, 5, 6, 0.01, 0.02, 0.005)
    drafts = {
        "untrained": [answer([1, 1]), answer([1])], "trained": [answer([2, 2]), answer([3], divergence=gone)]
    }
    plain = [Decoded([0] * 5, seconds=1.0), Decoded([0] * 4, seconds=1.0)]
    found = Measurement(
        DecodeSettings(8, 3), [Prompt("a", (1, 2)), Prompt("b", (3,))], plain, drafts
    ).summary()
    assert found == json.loads(json.dumps(found))
    assert [draft["acceptance_length"] for draft in found["drafts"]] == [1.0, 7 / 3]
    assert found["plain"]["tokens_per_s"] == 3.5
    assert found["drafts"][1]["speedup"] == (7 / 1.5) / 3.5
    assert (
        found["drafts"][1]["identical_answers"], found["drafts"][1]["divergences"][0]["prompt"]
    ) == (1, "b")
    (gain,) = found["differences"]
    assert (gain["draft"], gain["baseline"], round(gain["value"], 6)) == (
        "trained", "untrained", round(4 / 3, 6)
    )
    assert found["prompts"][0] == {
        "id": "a",
        "prompt_tokens": 2,
        "new_tokens": {"untrained": 3, "trained": 5},
        "passes": {"untrained": 2, "trained": 2},
        "gained": {"untrained": 2, "trained": 4},
    }


# -- prompts -------------------------------------------------------------------------------------------------


def turns(*roles: str, text: str = "hello") -> dict[str, Any]:
    return {"messages": [
        {"role": {"u": "user", "a": "assistant", "s": "system"}[role], "content": text} for role in roles
    ]}


def write_lines(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps({"id": f"r{i}", **record}) + "\n" for i, record in enumerate(records)))
    return path


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(byte_tokenizer(), 4096)


def test_a_prompt_ends_where_the_target_would_answer(tmp_path: Path, encoder: ChatEncoder) -> None:
    path = write_lines(tmp_path / "chats.jsonl", turns("s", "u", "a", "u", "a"), turns("u"))
    last, alone = (
        encoder.tokenizer.decode(prompt.ids) for prompt in load_prompts(path, encoder, 9, 4096).prompts
    )
    assert last.count("<|im_start|>assistant") == 2 and last.endswith("<|im_start|>assistant\n")
    assert alone.endswith("user\nhello<|im_end|>\n<|im_start|>assistant\n")
    first = encoder.tokenizer.decode(load_prompts(path, encoder, 1, 4096, "first").prompts[0].ids)
    assert first.count("<|im_start|>assistant") == 1


def test_skipped_prompts_are_counted(tmp_path: Path, encoder: ChatEncoder) -> None:
    chats = (turns("a"), turns("u", "a", text="x" * 500), turns("u", "a"), {"text": "abcdefgh"}, turns("u"))
    path = write_lines(tmp_path / "chats.jsonl", *chats)
    found = load_prompts(path, encoder, 2, 400)
    assert [prompt.id for prompt in found.prompts] == ["r2", "r3"]
    assert (found.too_long, found.unusable) == (1, 1)
    assert encoder.tokenizer.decode(found.prompts[1].ids) == "abcd"


def test_prompts_hold_the_tools_and_bad_records_are_counted(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson }}" + tokenizer.chat_template
    path = write_lines(tmp_path / "chats.jsonl", turns("u") | {"tools": [{"name": "add"}]}, {"messages": []})
    found = load_prompts(path, ChatEncoder(tokenizer, 4096), 2, 4096)
    assert '"name": "add"' in tokenizer.decode(found.prompts[0].ids)
    assert found.intake.reasons == {"no messages": 1}
    with pytest.raises(ValueError, match="line 2: expected a list"):
        load_prompts(path, ChatEncoder(tokenizer, 4096), 2, 4096, intake=Intake())


def test_the_recipes_template_variables_reach_the_prompts(target_folder: Path) -> None:
    files = acceptance.TargetFiles.open(str(target_folder), template_kwargs={"enable_thinking": False})
    assert files.encoder.template.kwargs == {"enable_thinking": False}


def test_a_file_without_usable_prompts_is_refused_with_the_reason(
    tmp_path: Path, encoder: ChatEncoder
) -> None:
    path = write_lines(tmp_path / "chats.jsonl", turns("a"), turns("u", "a"))
    with pytest.raises(ValueError, match="1 are longer than 5 tokens, 1 have nothing to answer"):
        load_prompts(path, encoder, 2, 5)


# -- drafts and their target ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("target"))


def training_recipe(root: Path, target: Path) -> Recipe:
    chats = write_lines(root / "chats.jsonl", *[turns("u", "a", text=f"question {i}") for i in range(6)])
    tree = recipe_for(PLAIN, root, str(target)).model_dump(mode="json")
    tree["data"]["eval_conversations"] = str(chats)
    tree["training"] |= {"ttt_steps": 3, "acceptance_interval": 1, "acceptance_prompts": 2}
    return Recipe.model_validate(tree)


def test_acceptance_during_training_is_that_of_the_current_draft(tmp_path: Path, target_folder: Path) -> None:
    recipe = training_recipe(tmp_path, target_folder)
    found = acceptance.measure_during_training(recipe, random_draft(), torch.device("cpu"), max_new_tokens=6)
    assert set(found) == {"accept_length", "accept_by_position", "accept_passes"}
    assert 1.0 <= found["accept_length"] <= 4.0 and len(found["accept_by_position"]) == 3
    assert found["accept_passes"] <= 2 * 5
    assert found == acceptance.measure_during_training(
        recipe, random_draft(), torch.device("cpu"), max_new_tokens=6
    )


def test_a_draft_for_another_target_is_refused(target_folder: Path) -> None:
    target = acceptance.TargetFiles.open(str(target_folder))
    draft = random_draft(type(PLAIN)(**{**PLAIN.__dict__, "target_vocab_size": 300}))
    with pytest.raises(ValueError, match=r"made for a target with vocab_size 300, but .* has 280"):
        draft.check_target(target.info, target.folder)


def decoding_job(target_folder: Path, **change: object) -> DecodingJob:
    files = acceptance.TargetFiles.open(str(target_folder))
    settings = {
        "drafts": {"a": random_draft(), "b": untrained_draft(PLAIN, random_draft().vocab)}, "device": "cpu"
    } | change
    return DecodingJob(files, (1, 2, 5), "float32", settings=DecodeSettings(8, 3, files.stop_ids), **settings)


def test_several_processes_give_the_answers_of_one_in_the_same_order(target_folder: Path) -> None:
    job, told = decoding_job(target_folder), []
    prompts = [Prompt(str(n), tuple(range(3, 9 + 5 * n))) for n in range(5)]
    alone = measure_job(job, prompts, 1, lambda tokens: None)
    shared = measure_job(job, prompts, 2, told.append)
    assert [answer.tokens for answer in shared.plain] == [answer.tokens for answer in alone.plain]
    for name in ("a", "b"):
        assert [answer.tokens for answer in shared.drafts[name]] == [
            answer.tokens for answer in alone.drafts[name]
        ]
        assert [answer.rounds for answer in shared.drafts[name]] == [
            answer.rounds for answer in alone.drafts[name]
        ]
    assert shared.summary()["prompts"] == alone.summary()["prompts"]
    assert sum(told) == sum(len(a.tokens) for a in (*shared.plain, *shared.drafts["a"], *shared.drafts["b"]))


def test_an_error_in_a_process_is_raised_here(target_folder: Path) -> None:
    job = decoding_job(target_folder, device="cuda:99")
    with pytest.raises(ValueError, match="cannot be loaded by transformers"):
        measure_job(job, [Prompt("0", (3, 4)), Prompt("1", (3, 4))], 2, lambda tokens: None)


def test_the_untrained_draft_is_reproducible(target_folder: Path) -> None:
    weights = load_target_weights(target_folder, ("lm_head",))
    vocab = random_draft().vocab
    state = torch.random.get_rng_state()
    first, again = (untrained_draft(PLAIN, vocab, seed=3) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first.state[name], again.state[name]) for name in first.state)
    built = first.build(weights["lm_head"], torch.bfloat16)
    assert built.fc.weight.dtype == torch.bfloat16 and not built.fc.weight.requires_grad


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_give_the_answers_of_one_prompt_at_a_time(target_folder: Path, processes: int) -> None:
    alone, told = decoding_job(target_folder), []
    prompts = [Prompt(str(n), tuple(range(3, 9 + 7 * ((3 * n) % 5)))) for n in range(5)]
    expected = measure_job(alone, prompts, 1, lambda tokens: None)
    found = measure_job(replace(alone, batch=2), prompts, processes, told.append)
    assert [answer.tokens for answer in found.plain] == [answer.tokens for answer in expected.plain]
    for name in ("a", "b"):
        answers = zip(found.drafts[name], expected.drafts[name], strict=True)
        assert all((one.tokens, one.rounds) == (other.tokens, other.rounds) for one, other in answers)
    assert found.summary()["prompts"] == expected.summary()["prompts"]
    assert sum(told) == sum(len(a.tokens) for a in (*found.plain, *found.drafts["a"], *found.drafts["b"]))


def test_the_first_passes_of_a_draft_are_not_timed(
    target_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call of a draft pays for compilation: without a warm-up its speed would depend on the order.
    """
    propose, slow = CachedDraft.propose, set()

    def compiling(draft: CachedDraft, steps: int) -> torch.Tensor:
        if draft not in slow:
            time.sleep(1.0)
        slow.add(draft)
        return propose(draft, steps)

    monkeypatch.setattr(CachedDraft, "propose", compiling)
    prompts = [Prompt("0", (3, 4, 5)), Prompt("1", (6, 7))]
    found = measure_job(decoding_job(target_folder), prompts, 1, lambda tokens: None)
    assert len(slow) == 2
    for answers in found.drafts.values():
        # Every timed pass together takes well under the second that each draft slept.
        assert len(rounds_of(answers)) == 14 and max(answer.seconds for answer in answers) < 1.0


@pytest.mark.parametrize("batch", [1, 2])
def test_target_and_drafts_decode_without_cudnns_attention(
    target_folder: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """cuDNN plans anew for every shape, and every pass of decoding has another shape."""
    seen: dict[str, set[SDPBackend]] = {}

    def watch(owner: type, method: str) -> None:
        inner = getattr(owner, method)

        def watched(self: Any, *given: Any, **options: Any) -> Any:
            seen.setdefault(f"{owner.__name__}.{method}", set()).update(_cur_sdpa_kernel_backends())
            return inner(self, *given, **options)

        monkeypatch.setattr(owner, method, watched)

    for owner in (CachedDraft, BatchedDraft):
        watch(owner, "propose")
        watch(owner, "extend")
    watch(CachedTarget, "run")  # of prompts and of decoding
    before = _cur_sdpa_kernel_backends()
    prompts = [Prompt("0", (3, 4, 5)), Prompt("1", (6, 7))]
    measure_job(replace(decoding_job(target_folder), batch=batch), prompts, 1, lambda tokens: None)
    draft = "CachedDraft" if batch == 1 else "BatchedDraft"
    assert set(seen) == {"CachedTarget.run", f"{draft}.propose", f"{draft}.extend"}
    assert all(backends == set(acceptance.ATTENTION) for backends in seen.values())
    assert SDPBackend.CUDNN_ATTENTION not in acceptance.ATTENTION
    assert _cur_sdpa_kernel_backends() == before
