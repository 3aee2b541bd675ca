"""StepProjections equals the projections of [norm(e) ; norm(g)], computed whole at every TTT step.

StepProjections computes each token's half once, for all steps. q, k, v and all gradients are compared.
"""

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
SIZES = {"query_heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "eps": EPS}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def cos_and_sin(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return 2 cos and 2 sin: a factor on the rotation, as YaRN has one, must reach the gradients too."""
    angles = positions[:, None, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    return 2 * angles.cos(), 2 * angles.sin()


def project_whole(
    embeddings: Tensor, index: Tensor, positions: Tensor, states: list[Tensor], weights: ProjectionWeights
) -> list[Tensor]:
    """Return q of step 0, then q, k and v of every later step, from the whole input [norm(e) ; norm(g)]."""
    results = []
    for step, state in enumerate(states):
        token = rms_norm(embeddings[index[step]], (WIDTH,), weights.token_norm, EPS)
        z = torch.cat([token, rms_norm(state, (WIDTH,), weights.state_norm, EPS)], -1)
        qkv = z @ weights.weight.t() + (0 if weights.bias is None else weights.bias)
        q, k, v = qkv.unflatten(-1, (-1, HEAD_DIM)).split([HEADS, KV_HEADS, KV_HEADS], 1)
        angles = cos_and_sin(positions + step)
        results.append(PlainOperations.rope(q, *angles))
        if step:
            results += [PlainOperations.rope(k, *angles), v]
    return results


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_steps_equal_projections_of_the_whole_input(
    table: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE_ROWS", 4)  # several tiles, the last one short
    torch.manual_seed(0)
    columns = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    matrix, shift = random(columns, 2 * WIDTH), random(columns) if bias else None
    weights = ProjectionWeights(matrix, shift, random(WIDTH), random(WIDTH))
    tokens, states = random(20 if table else TOKENS, WIDTH), [random(ROWS, WIDTH) for _ in range(STEPS)]
    ids = torch.randint(20, (TOKENS,)) if table else None
    # Within a step no token is read twice, but several steps read the same token.
    index = torch.stack([torch.randperm(TOKENS)[:ROWS] for _ in range(STEPS)])
    positions = torch.arange(ROWS) * 2

    project = StepProjections(index, positions, cos_and_sin, **SIZES)
    backward_token = project.begin(tokens, ids, weights)
    found = [x for step, state in enumerate(states) for x in project(backward_token, step, state)]
    assert project.table is None, "the last step must free the table"
    expected = project_whole(tokens if ids is None else tokens[ids], index, positions, states, weights)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    leaves = [*states, *(w for w in weights if w is not None), *([] if table else [tokens])]
    seeds = [torch.randn_like(x) for x in found]
    gradients, gradients_expected = (torch.autograd.grad(x, leaves, seeds) for x in (found, expected))
    torch.testing.assert_close(gradients, gradients_expected, rtol=1e-11, atol=1e-11)


def test_a_second_backward_is_refused() -> None:
    weights = ProjectionWeights(random(HEADS * HEAD_DIM + 16, 2 * WIDTH), None, random(WIDTH), random(WIDTH))
    project = StepProjections(torch.arange(5)[None], torch.arange(5), cos_and_sin, **SIZES)
    (q,) = project(project.begin(random(5, WIDTH), None, weights), 0, random(5, WIDTH))
    q.sum().backward(retain_graph=True)
    with pytest.raises(AssertionError, match="a second backward finds nothing"):
        q.sum().backward()


def test_add_rows_adds_to_the_rows_that_take_rows_reads() -> None:
    table, index = torch.arange(20.0).view(5, 4), torch.tensor([3, 0])
    taken = operations_for(table).take_rows(table, index, 3)
    assert taken.tolist() == [[12, 13, 14], [0, 1, 2]]
    total = torch.zeros(5, 4)
    operations_for(total).add_rows(total, index, taken)
    assert torch.equal(total[index, :3], taken) and total.sum() == taken.sum()


@pytest.mark.gpu
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gpu_steps_agree_with_float64(
    table: bool, bias: bool, monkeypatch: pytest.MonkeyPatch, device: str = "cuda"
) -> None:
    """Compare q, k, v and every gradient in bf16, with the sizes of a small Llama draft and several tiles.

    The last ``past`` rows lie past a document's end: all share the last token and have no gradient.
    """
    monkeypatch.setattr(tiles, "TILE_ROWS", 700)
    torch.manual_seed(0)
    tokens, rows, past, steps = 3000, 2500, 40, 3
    width, heads, kv_heads, d = 512, 8, 2, 64
    columns = (heads + 2 * kv_heads) * d
    values = [torch.randn(columns, 2 * width, device=device) * width**-0.5]
    shapes = [(columns,), (width,), (width,), (4000 if table else tokens, width), *[(rows, width)] * steps]
    values += [torch.randn(*shape, device=device) for shape in shapes]
    ids = torch.randint(4000, (tokens,), device=device) if table else None
    positions = torch.arange(rows, device=device)
    index = torch.stack([torch.randperm(tokens - 1, device=device)[:rows] for _ in range(steps)])
    index[:, -past:] = tokens - 1
    frequencies = 1e4 ** -(torch.arange(d // 2, device=device) / (d // 2))
    seeds: list[Tensor] = []

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in values]
        weight, shift, token_norm, state_norm, embeddings, *states = leaves
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def rotation(at: Tensor) -> tuple[Tensor, Tensor]:
            angles = at[:, None, None].to(wide) * frequencies.to(wide)
            return angles.cos(), angles.sin()

        sizes = {"query_heads": heads, "kv_heads": kv_heads, "head_dim": d, "eps": EPS}
        project = StepProjections(index, positions, rotation, **sizes)
        parameters = ProjectionWeights(weight, shift if bias else None, token_norm, state_norm)
        backward_token = project.begin(embeddings.detach() if table else embeddings, ids, parameters)
        found = [x for step, state in enumerate(states) for x in project(backward_token, step, state)]
        if not seeds:
            seeds.extend(torch.randn_like(x) for x in found)
            for seed in seeds:
                seed[-past:] = 0
        used = [weight, token_norm, state_norm, *states]
        used += ([shift] if bias else []) + ([] if table else [embeddings])
        return found + list(torch.autograd.grad(found, used, [seed.to(dtype) for seed in seeds]))

    for found, expected in zip(run(torch.bfloat16), run(torch.float64), strict=True):
        assert (found.double() - expected).norm() < 6e-3 * expected.norm()
