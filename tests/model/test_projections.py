"""Each token's half made once against [norm(e) ; norm(g)] written out for every step: q, k, v and all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from eagle_ds.kernels.backend import PlainOperations, operations_for
from eagle_ds.model.projections import ProjectionWeights, StepProjections
from eagle_ds.sharding import tiles

TOKENS, ROWS, STEPS, WIDTH, EPS = 13, 9, 3, 6, 1e-5
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 4


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def rotation(positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions[:, None, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    return 2 * angles.cos(), 2 * angles.sin()


def written_out(embeddings: Tensor, index: Tensor, positions: Tensor, states: list[Tensor], weights: ProjectionWeights) -> list[Tensor]:
    made = []
    for step, state in enumerate(states):
        token = rms_norm(embeddings[index[step]], (WIDTH,), weights.token_norm, EPS)
        z = torch.cat([token, rms_norm(state, (WIDTH,), weights.state_norm, EPS)], -1)
        qkv = z @ weights.weight.t() + (0 if weights.bias is None else weights.bias)
        q, k, v = qkv.unflatten(-1, (-1, HEAD_DIM)).split([HEADS, KV_HEADS, KV_HEADS], 1)
        angles = rotation(positions + step)
        made += [PlainOperations.rope(q, *angles)] + ([PlainOperations.rope(k, *angles), v] if step else [])
    return made


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_steps_project_as_if_everything_were_written_out(table: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_ROWS", 4)  # several tiles, the last one short
    torch.manual_seed(0)
    columns = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    weights = ProjectionWeights(random(columns, 2 * WIDTH), random(columns) if bias else None, random(WIDTH), random(WIDTH))
    tokens, states = random(20 if table else TOKENS, WIDTH), [random(ROWS, WIDTH) for _ in range(STEPS)]
    ids = torch.randint(20, (TOKENS,)) if table else None
    index = torch.stack([torch.randperm(TOKENS)[:ROWS] for _ in range(STEPS)])  # a token once a step, in several steps
    positions = torch.arange(ROWS) * 2

    project = StepProjections(index, positions, rotation, query_heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, eps=EPS)
    begun = project.begin(tokens, ids, weights)
    found = [x for step, state in enumerate(states) for x in project(begun, step, state)]
    assert project.table is None, "nothing of it is needed after the last step"
    expected = written_out(tokens if ids is None else tokens[ids], index, positions, states, weights)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    leaves = [*states, *(w for w in weights if w is not None), *([] if table else [tokens])]
    seeds = [torch.randn_like(x) for x in found]
    gradients = torch.autograd.grad(found, leaves, seeds)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, leaves, seeds), rtol=1e-11, atol=1e-11)


def test_a_second_backward_is_refused() -> None:
    weights = ProjectionWeights(random(HEADS * HEAD_DIM + 16, 2 * WIDTH), None, random(WIDTH), random(WIDTH))
    project = StepProjections(torch.arange(5)[None], torch.arange(5), rotation, query_heads=4, kv_heads=2, head_dim=4, eps=EPS)
    (q,) = project(project.begin(random(5, WIDTH), None, weights), 0, random(5, WIDTH))
    q.sum().backward(retain_graph=True)
    with pytest.raises(AssertionError, match="a second backward finds nothing"):
        q.sum().backward()


def test_rows_are_taken_and_added_where_the_index_says() -> None:
    table, index = torch.arange(20.0).view(5, 4), torch.tensor([3, 0])
    taken = operations_for(table).take_rows(table, index, 3)
    assert taken.tolist() == [[12, 13, 14], [0, 1, 2]]
    total = torch.zeros(5, 4)
    operations_for(total).add_rows(total, index, taken)
    assert torch.equal(total[index, :3], taken) and total.sum() == taken.sum()


@pytest.mark.gpu
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gpus_steps_agree_with_float64(table: bool, bias: bool, monkeypatch: pytest.MonkeyPatch, device: str = "cuda") -> None:
    """Sizes of a small Llama draft, bf16, several tiles: q, k, v and every gradient. Rows past a document's end share the last
    token and have no gradient."""
    monkeypatch.setattr(tiles, "TILE_ROWS", 700)
    torch.manual_seed(0)
    tokens, rows, past, steps, width, heads, kv_heads, d = 3000, 2500, 40, 3, 512, 8, 2, 64
    columns = (heads + 2 * kv_heads) * d
    shapes = [(columns, 2 * width), (columns,), (width,), (width,), (4000 if table else tokens, width), *[(rows, width)] * steps]
    values = [torch.randn(*shape, device=device) * (width**-0.5 if shape == shapes[0] else 1) for shape in shapes]
    ids, positions = torch.randint(4000, (tokens,), device=device) if table else None, torch.arange(rows, device=device)
    index = torch.stack([torch.randperm(tokens - 1, device=device)[:rows] for _ in range(steps)])
    index[:, -past:] = tokens - 1
    frequencies = 1e4 ** -(torch.arange(d // 2, device=device) / (d // 2))
    seeds: list[Tensor] = []

    def run(dtype: torch.dtype) -> list[Tensor]:
        weight, shift, token_norm, state_norm, embeddings, *states = (x.bfloat16().to(dtype).requires_grad_() for x in values)
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def angles(at: Tensor) -> tuple[Tensor, Tensor]:
            turned = at[:, None, None].to(wide) * frequencies.to(wide)
            return turned.cos(), turned.sin()

        project = StepProjections(index, positions, angles, query_heads=heads, kv_heads=kv_heads, head_dim=d, eps=EPS)
        parameters = ProjectionWeights(weight, shift if bias else None, token_norm, state_norm)
        begun = project.begin(embeddings.detach() if table else embeddings, ids, parameters)
        made = [x for step, state in enumerate(states) for x in project(begun, step, state)]
        if not seeds:
            seeds.extend(torch.randn_like(x) for x in made)
            for seed in seeds:
                seed[-past:] = 0
        leaves = [weight, token_norm, state_norm, *states, *([shift] if bias else []), *([] if table else [embeddings])]
        return made + list(torch.autograd.grad(made, leaves, [s.to(dtype) for s in seeds]))

    for found, expected in zip(run(torch.bfloat16), run(torch.float64), strict=True):
        assert (found.double() - expected).norm() < 6e-3 * expected.norm()
