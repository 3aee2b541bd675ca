"""Figures of a served draft agree with what a server of known behaviour did; bad loads are refused unsent."""

from __future__ import annotations

import pytest
import torch

from eagle_ds.evaluation.acceptance import Prompt
from eagle_ds.evaluation.http_client import Http
from eagle_ds.evaluation.serving_agreement import (
    NEAR_TIE,
    Difference,
    compare_with,
    greedy_differences,
    logit_spacing,
)
from eagle_ds.evaluation.serving_bench import Load, run_level
from eagle_ds.evaluation.serving_client import Accepted, connect
from tests.evaluation.fake_servers import VOCAB, FakeServer, serving

PROMPTS = [Prompt(f"p{n}", tuple(range(3, 6 + 60 * n))) for n in range(6)]
# 19 tokens: 1 from the prompt, then passes that gain 2, 2, 4, 2, 2, 4 and 2.
PASSES, GAINED = 7, 18


def expected_answer(prompt: Prompt, tokens: int = 19) -> list[int]:
    return [(prompt.ids[-1] + 1 + i) % VOCAB for i in range(tokens)]


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_acceptance_is_that_of_the_passes_that_the_server_made(engine: str) -> None:
    with serving(FakeServer(engine)) as fake:
        server = connect(fake.url)
        level = run_level(server, Load(PROMPTS, 19), 3).summary()
    assert (level["passes"], level["gained"]) == (PASSES * 6, GAINED * 6)
    assert level["acceptance_length"] == GAINED / PASSES
    # Every pass accepts one draft token; two of seven accept three.
    assert level["acceptance_by_position"] == [1.0, 2 / 7, 1.0]
    assert level["cumulative_by_position"] == [1.0, 2 / 7, 2 / 7]
    assert [one["output"] for one in level["answers"]] == [expected_answer(prompt) for prompt in PROMPTS]
    assert level["tokens_counted"] and level["new_tokens"] == 19 * 6


def test_a_level_keeps_as_many_requests_in_flight_as_asked_and_warms_up_first() -> None:
    with serving(FakeServer()) as fake:
        server = connect(fake.url)
        run_level(server, Load(PROMPTS, 19), 1)
        assert fake.most_in_flight == 1
        fake.together = 4
        run_level(server, Load(PROMPTS, 19), 4)
    assert fake.most_in_flight == 4
    assert fake.flushes == 2  # after each warm-up
    lengths = [body["sampling_params"]["max_new_tokens"] for body in fake.requests]
    assert lengths == [16] + 6 * [19] + 4 * [16] + 6 * [19]


def test_times_come_from_the_pieces_of_the_answer() -> None:
    with serving(FakeServer(wait_s=0.2)) as fake:
        level = run_level(connect(fake.url), Load(PROMPTS[:2], 19), 1).summary()
    # Eight pieces of 200 ms; the later seven hold 18 tokens: 200 ms over 2 tokens, or over 4.
    assert level["first_token_ms"]["median"] >= 200
    assert 50 <= level["between_tokens_ms"]["median"] < level["first_token_ms"]["median"]
    assert level["between_tokens_ms"]["p99"] >= 100
    assert level["seconds"] >= 2 * 8 * 0.2
    assert level["tokens_per_s"] == pytest.approx(2 * 19 / level["seconds"])
    assert level["tokens_per_s_each"] < 18 / (7 * 0.2) + 1


def test_prompts_are_summarised_by_context_length() -> None:
    with serving(FakeServer()) as fake:
        level = run_level(connect(fake.url), Load(PROMPTS, 19), 2).summary()
    lengths = [len(prompt.ids) for prompt in PROMPTS]
    inside = sum(length < 256 for length in lengths)
    buckets = [(one["from"], one["to"], one["requests"]) for one in level["by_context"]]
    assert buckets == [(0, 256, inside), (256, 512, len(PROMPTS) - inside)]
    assert all(one["acceptance_length"] == GAINED / PASSES for one in level["by_context"])
    assert sum(one["prompt_tokens"] for one in level["by_context"]) == sum(lengths)


def test_tokens_after_a_stop_token_are_not_gained() -> None:
    prompt, stop = PROMPTS[0], 13  # the answer is 6, 7, ..., 13: the prompt's token and 2, 2, then 3 of 4
    with serving(FakeServer()) as fake:
        (answer,) = run_level(connect(fake.url), Load([prompt], 19, [stop]), 1).answers
    assert answer.output == list(range(6, 14))
    assert (answer.accepted.passes, answer.accepted.gained) == (3, 7)


def test_a_server_without_speculation_reports_no_acceptance() -> None:
    for engine in ("sglang", "vllm", "openai"):
        with serving(FakeServer(engine, drafts=0)) as fake:
            level = run_level(connect(fake.url), Load(PROMPTS, 8), 2).summary()
        assert "acceptance_length" not in level and level["new_tokens"] == 8 * 6


@pytest.mark.parametrize(("answer", "emptied"), [(None, False), (False, False), (True, True)])
def test_a_cache_counts_as_emptied_only_if_vllm_says_so(answer: bool | None, emptied: bool) -> None:
    with serving(FakeServer("vllm", can_flush=answer)) as fake:
        assert connect(fake.url).empty_cache() is emptied


def test_vllm_shows_its_draft_tokens_in_its_counters() -> None:
    for drafts in (0, 3):
        with serving(FakeServer("vllm", drafts=drafts)) as fake:
            assert connect(fake.url).info.num_draft_tokens == drafts


def test_a_server_that_reports_little_gives_texts_and_equal_pieces() -> None:
    with serving(FakeServer("openai")) as fake:
        level = run_level(connect(fake.url), Load(PROMPTS[:1], 19), 1).summary()
    assert level["answers"][0]["output"] == "".join(f"<{t}>" for t in expected_answer(PROMPTS[0]))
    assert not level["tokens_counted"] and not level["cache_emptied"]
    assert level["new_tokens"] == 19
    assert "stop_token_ids" not in fake.requests[0]


def test_counters_and_answers_add_up() -> None:
    total = Accepted(3, 7, (3, 1)) + Accepted(2, 5, (2, 1, 1))
    assert total == Accepted(5, 12, (5, 2, 1))
    assert total.since(Accepted(2, 5, (2, 1, 1))) == Accepted(3, 7, (3, 1, 0))


# -- loads that cannot be served -----------------------------------------------------------------------------


def test_a_prompt_longer_than_the_served_context_is_refused_before_anything_is_sent() -> None:
    with serving(FakeServer(context=100)) as fake:
        load = Load(PROMPTS, 19)
        with pytest.raises(ValueError, match=r"p2 has 123 tokens.*context of 100;.*--max-prompt-tokens 81"):
            load.check(connect(fake.url), 10_000, [1])
        assert not fake.requests


def test_a_server_that_hides_its_context_is_held_to_the_targets() -> None:
    with serving(FakeServer("openai", context=None)) as fake:
        server = connect(fake.url)
        with pytest.raises(ValueError, match="serves a context of 200"):
            Load(PROMPTS, 19).check(server, 200, [1])


def test_a_concurrency_above_the_number_of_prompts_is_refused() -> None:
    with serving(FakeServer()) as fake:
        server = connect(fake.url)
        with pytest.raises(ValueError, match="--concurrency 8 needs as many prompts"):
            Load(PROMPTS, 19).check(server, 4096, [1, 8])


def test_an_address_where_nothing_runs_is_named() -> None:
    with pytest.raises(ValueError, match=r"127.0.0.1:9 cannot be reached .*start the server"):
        connect("http://127.0.0.1:9")


def test_an_error_of_the_server_is_shown() -> None:
    with serving(FakeServer(fail_after=2)) as fake:
        server = connect(fake.url)
        with pytest.raises(ValueError, match=r"answered 500 .*out of memory"):
            run_level(server, Load(PROMPTS, 19), 1)


def test_text_that_is_no_json_is_shown() -> None:
    with serving(FakeServer("vllm")) as fake, pytest.raises(ValueError, match="no JSON: b'# HELP"):
        Http(fake.url).get("/metrics")


# -- agreement -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
@pytest.mark.parametrize(("gap", "near_tie"), [(0.1, True), (1.5, False)])
def test_an_answer_that_differs_is_found_with_its_gap(engine: str, gap: float, near_tie: bool) -> None:
    load = Load(PROMPTS[:2], 8)
    with serving(FakeServer(engine, drafts=0)) as fake:
        plain = run_level(connect(fake.url), load, 1).summary()
    with serving(FakeServer(engine, other_token_at=5, gap=gap)) as fake:
        server = connect(fake.url)
        level = run_level(server, load, 1).summary()
        found = greedy_differences(server, load.prompts, level, plain)
        asked = fake.requests[-1]
    assert [(one.prompt, one.position, one.near_tie) for one in found] == [
        ("p0", 5, near_tie), ("p1", 5, near_tie)
    ]
    assert found[0].gap == pytest.approx(gap)
    assert found[0].plain_token == expected_answer(PROMPTS[0])[5] == found[0].token - 1
    key = "input_ids" if engine == "sglang" else "prompt"
    assert asked[key] == [*PROMPTS[1].ids, *expected_answer(PROMPTS[1], 5)]


def test_equal_answers_have_no_differences() -> None:
    with serving(FakeServer()) as fake:
        server = connect(fake.url)
        level = run_level(server, Load(PROMPTS, 8), 2).summary()
        assert greedy_differences(server, PROMPTS, level, level) == []


def difference(gap: float | None) -> Difference:
    return Difference("p", 1, 0, 3, 4, gap)


@pytest.mark.parametrize(
    ("gap", "near_tie"),
    [(0.0, True), (0.25, True), (0.25000011920928955, True), (-0.25000006, True), (0.2501, False),
     (0.3125, False), (-0.3125, False), (None, False)],
)
def test_a_near_tie_is_a_gap_of_two_spacings_whatever_float32_makes_of_it(
    gap: float | None, near_tie: bool
) -> None:
    assert difference(gap).near_tie is near_tie


def test_logits_that_move_by_less_than_a_spacing_give_gaps_of_two_spacings_at_most() -> None:
    """The derivation of NEAR_TIE: two choices differ, and a third pass measures the gap."""
    generator, u = torch.Generator().manual_seed(0), 0.125
    exact = 17 + 14 * torch.rand(200_000, 1, generator=generator)  # of both tokens, up to 3 u apart
    exact = exact + torch.rand(200_000, 2, generator=generator) * 3 * u
    moved = (torch.rand(3, 200_000, 2, generator=generator) - 0.5) * 0.999 * u  # in each of three passes
    plain, speculation, third = (exact + moved).clamp(max=31.8).to(torch.bfloat16).float().diff(dim=-1)
    other_choice = (plain * speculation < 0) | ((plain == 0) & (speculation != 0))
    gaps = third[other_choice].abs()
    assert len(gaps) > 1000 and gaps.max() == NEAR_TIE


@pytest.mark.parametrize(
    ("gaps", "spacing"),
    [([0.125, -0.25, 0.0, 0.25000012], 0.125), ([0.25, 0.3125, None], 0.0625), ([0.1], None), ([0.0], None),
     ([], None)],
)
def test_the_spacing_of_logits_is_the_largest_power_of_two_that_divides_all_gaps(
    gaps: list[float | None], spacing: float | None
) -> None:
    assert logit_spacing([difference(gap) for gap in gaps]) == spacing


def acceptance_json(gained: int = GAINED, **change: object) -> dict[str, object]:
    counts = {"gained": {"draft": gained}, "passes": {"draft": PASSES}}
    prompts = [{"id": one.id, "prompt_tokens": len(one.ids)} | counts for one in PROMPTS]
    drafts = [{"name": "draft"}]
    return {"drafts": drafts, "prompts": prompts, "num_draft_tokens": 3, "max_new_tokens": 19} | change


def benchmark_json() -> dict[str, object]:
    level = {"concurrency": 1, "acceptance_length": GAINED / PASSES}
    return {
        "server": {"url": "http://x", "num_draft_tokens": 3},
        "max_new_tokens": 19,
        "prompts": [{"id": one.id, "prompt_tokens": len(one.ids)} for one in PROMPTS],
        "levels": [{"concurrency": 8, "acceptance_length": 9.0}, level],
    }


def test_served_and_measured_acceptance_agree_within_three_percent() -> None:
    same = compare_with(acceptance_json(), benchmark_json(), None)
    assert (same.ratio, same.agrees, same.prompts, same.draft) == (1.0, True, 6, "draft")
    worse = compare_with(acceptance_json(gained=GAINED + 1), benchmark_json(), "draft")
    assert worse.ratio == pytest.approx(18 / 19) and not worse.agrees


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_draft_tokens": 5}, "draft tokens per pass is 3 on the server and 5 in acceptance.json"),
        ({"max_new_tokens": 64}, "longest answer is 19 on the server and 64"),
        ({"prompts": []}, r"some prompts are not in acceptance.json \(6 of 6, for example p0\)"),
        ({"drafts": []}, "has no drafts"),
        ({"drafts": [{"name": "other"}]}, "has no draft draft; it has other"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_with(acceptance_json(**change), benchmark_json(), "draft")
