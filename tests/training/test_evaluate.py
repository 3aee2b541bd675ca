"""Evaluation counts every held-out sample once in any layout; metrics and learning rate follow their
formulas.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eagle_ds.config.run_state import Best
from eagle_ds.config.sections import TrainingConfig
from eagle_ds.drafts.loading import load_draft
from eagle_ds.model.loss import COLUMNS, LossSums
from eagle_ds.training.checkpoint import latest
from eagle_ds.training.metrics import metrics_of, step_weights
from eagle_ds.training.runlog import keep_until, scalars
from eagle_ds.training.step import learning_rate
from tests.gloo_pool import GlooPool
from tests.tiny_targets import save_tiny_llama
from tests.training.dense_reference import dense_step
from tests.training.tiny_run import MASKS, Tiny, make_tiny, write_store
from tests.training.training_ranks import run_training


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("world", "layout", "stage", "loss"),
    [
        (1, {}, 0, "kl"),
        (2, {}, 1, "kl"),  # dp 2 over 3 packs: one rank repeats a pack, which must not count
        (2, {}, 3, "kl"),
        (4, {"parallel__ring": 2}, 3, "kl"),
        (2, {"data__pack_tokens": 500, "parallel__ulysses": 2}, 1, "lambda"),
        (4, {"parallel__ulysses": 2, "training__loss_normalization": "positions"}, 1, "alpha"),
    ],
)
def test_every_held_out_sample_counts_once(
    pool: GlooPool, tiny: Tiny, world: int, layout: dict[str, Any], stage: int, loss: str
) -> None:
    name = f"eval{world}{stage}{loss}"
    fixed = {
        "training__max_steps": 1,
        "training__eval_interval": 1,
        "training__loss": loss,
        "training__learning_rate": 1e-30,
    }
    recipe = tiny.recipe(name, **fixed, deepspeed=str(tiny.root / f"ds_stage{stage}.json"), **layout)
    pool.run(run_training, world, recipe)
    dense = dense_step(
        recipe, load_file(recipe.run_dir / "best" / "draft_state.safetensors"), recipe.data.eval_store
    )
    lines = [json.loads(line) for line in (recipe.run_dir / "eval.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    for line in lines:
        assert line["loss"] == pytest.approx(dense.loss, rel=2e-5)
        assert line["trained_rows"] == int(dense.sums.length[1])
        assert line["accuracy"] == pytest.approx((dense.sums.correct / dense.sums.trained).tolist())
        assert line["acceptance"] == pytest.approx((dense.sums.alpha / dense.sums.trained).tolist(), rel=1e-4)
        assert line["simulated_length"] == pytest.approx(
            1 + float(dense.sums.length[0] / dense.sums.length[1]), rel=1e-5
        )


def test_real_decoding_during_training_chooses_the_best_draft(pool: GlooPool, tmp_path: Path) -> None:
    tiny = Tiny(tmp_path)
    save_tiny_llama(tiny.target)
    for name, seed in (("train", 1), ("held_out", 2)):
        write_store(tmp_path / name, tiny.target, MASKS, seed=seed)
    (tmp_path / "ds_stage1.json").write_text("{}")
    chat = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hi"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"id": "a", "messages": chat}) + "\n")
    recipe = tiny.recipe(
        target__hidden_size=32,
        target__vocab_size=280,
        draft__hidden_size=32,
        draft__vocab_size=100,
        data__max_length=256,
        data__eval_conversations=str(tmp_path / "chats.jsonl"),
        training__acceptance_interval=2,
        training__eval_interval=3,
        training__best_by="acceptance",
        training__max_steps=3,
        parallel__ring=2,
    )
    pool.run(run_training, 2, recipe)
    lines = [json.loads(line) for line in (recipe.run_dir / "eval.jsonl").read_text().splitlines()]
    assert [(line["step"], "accept_length" in line) for line in lines] == [(0, False), (2, True), (3, True)]
    assert all("loss" in line for line in lines)
    best = max(lines[1:], key=lambda line: line["accept_length"])
    assert latest(recipe.run_dir).best == Best(best["step"], best["accept_length"])
    assert load_draft(recipe.run_dir / "best").arch.hidden_size == 32


def sums(**columns: list[float]) -> LossSums:
    steps = torch.zeros(2, len(COLUMNS), dtype=torch.float64)
    for name, values in columns.items():
        steps[:, COLUMNS.index(name)] = torch.tensor(values, dtype=torch.float64)
    return LossSums(steps, torch.tensor([3.0, 4.0], dtype=torch.float64))


def test_metrics_follow_their_formulas() -> None:
    found = sums(
        loss=[8, 6],
        cross_entropy=[8, 6],
        entropy=[4, 3],
        counted=[4, 2],
        trained=[8, 4],
        correct=[2, 1],
        alpha=[4, 1],
    )
    decay = torch.tensor([1.0, 0.5], dtype=torch.float64)
    metrics = metrics_of(found, decay, None)
    assert metrics.loss == 8 / 4 + 0.5 * 6 / 2
    assert metrics.kl == 4 / 4 + 0.5 * 3 / 2
    assert metrics.accuracy == [0.25, 0.25] and metrics.acceptance == [0.5, 0.25]
    assert metrics.simulated_length == 1.75 and metrics.trained_rows == 4
    assert metrics_of(found, decay, 10).loss == pytest.approx(0.8 + 0.5 * 0.6)


def test_a_step_that_counts_nothing_adds_nothing() -> None:
    decay = torch.tensor([1.0, 0.5], dtype=torch.float64)
    assert step_weights(torch.tensor([4, 0]), decay, None).tolist() == [0.25, 0.0]
    metrics = metrics_of(sums(loss=[8, 0], counted=[4, 0], trained=[8, 0]), decay, None)
    assert metrics.loss == 2.0 and metrics.accuracy[1] == 0.0


def test_the_learning_rate_rises_then_falls_to_its_minimum() -> None:
    training = TrainingConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_ratio=0.1, schedule="cosine")
    rates = [learning_rate(step, 100, training) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[55] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 45 / 90)) / 2)
    assert learning_rate(100, 100, training) == pytest.approx(0.1)
    linear = TrainingConfig(learning_rate=1.0, warmup_ratio=0.0, schedule="linear")
    assert [learning_rate(step, 4, linear) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    constant = TrainingConfig(learning_rate=1.0, warmup_ratio=0.5, schedule="constant")
    assert [learning_rate(step, 4, constant) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_log_lines_after_the_checkpoint_and_incomplete_ones_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    keep_until(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_monitors_get_numbers_only() -> None:
    assert scalars({"loss": 1, "accuracy": [0.5, 0.25], "name": "x"}) == [
        ("loss", 1.0),
        ("accuracy_0", 0.5),
        ("accuracy_1", 0.25),
    ]
