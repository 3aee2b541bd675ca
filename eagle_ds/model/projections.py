"""q, k and v of the query rows at every TTT step, with the token's half computed once.

The projections read z = [norm(e) ; norm(g)], so W z = W_e norm(e) + W_g norm(g), where e is the embedding of
one token. Row p of step k reads token p+1+k, as row p+1 of step k-1 does, and all steps use the same W_e. So
W_e norm(e) is computed once for each token, before the first step, into a table [tokens, (Hq + 2 Hkv) d]. A
step reads its rows of the table, adds W_g norm(g_k), and rotates. For an 8B draft this saves 5.4% of all
FLOPs of matmuls. A draft that norms q and k does so before it rotates them; the steps then return q and k
unrotated, and the caller norms and rotates them.

Backward. Write dqkv_k for the gradient of step k before the rotation. Row t-1-k of step k reads token t, so

    d table[t]  = sum over k of dqkv_k[t-1-k]
    dW_e        = d table^T norm(e),   d norm(e) = d table W_e      once, after the backward of all steps
    dW_g        = sum over k of dqkv_k^T norm(g_k)
    d norm(g_k) = dqkv_k W_g

The sums over k are kept in float32: `_Step.backward` adds to them, and `_Begin.backward` completes them. A
backward token (model/ttt.py) makes the second run after all the first. A step saves g_k only: norm(g_k) is
recomputed, and the backward of the rotation needs the angles but neither q nor k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle_ds.kernels.attention import wide
from eagle_ds.kernels.backend import PlainOperations, operations_for
from eagle_ds.parallel.copies import copy_rows
from eagle_ds.sharding.tiles import tile_rows


class ProjectionWeights(NamedTuple):
    """Weights of q, k and v, concatenated by rows, and of the norms of both halves of their input."""

    weight: Tensor  # [(Hq + 2 Hkv) d, 2D]
    bias: Tensor | None  # [(Hq + 2 Hkv) d]
    token_norm: Tensor  # [D]
    state_norm: Tensor  # [D]


class StepProjections:
    """The projections of one micro-batch: call ``begin``, then each step in order, once.

    Args:
        token_index: int64 [T, N]; row p of step k reads token ``token_index[k, p]``.
        positions: RoPE positions of the query rows at step 0, int64 [N].
        rotation: maps int64 positions to (cos, sin). None: the steps return q and k unrotated.
    """

    def __init__(
        self, token_index: Tensor, positions: Tensor,
        rotation: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
        *, query_heads: int, kv_heads: int, head_dim: int, eps: float,
    ) -> None:  # fmt: skip
        self.token_index = token_index
        self.positions, self.rotation = positions, rotation
        self.query_heads, self.kv_heads = query_heads, kv_heads
        self.head_dim, self.eps = head_dim, eps
        self.table: Tensor | None = None  # W_e norm(e), freed by the last step
        self._weights: ProjectionWeights | None = None  # freed by the last backward
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None
        self._tokens = 0
        self.operations: type[PlainOperations] = PlainOperations  # chosen in ``begin``

    def begin(self, tokens: Tensor, rows: Tensor | None, weights: ProjectionWeights) -> Tensor:
        """Compute the table, and return the backward token that every step needs.

        Args:
            tokens: embeddings [M, D], or a frozen table (no gradient).
            rows: int64 [M], rows of the frozen table; None if ``tokens`` are embeddings.
            weights: differentiable copies.
        """
        self._weights = ProjectionWeights(*(w if w is None else w.detach() for w in weights))
        self.operations = operations_for(weights.weight)
        self._tokens = len(tokens if rows is None else rows)
        return _Begin.apply(self, tokens, rows, *weights)

    def __call__(self, backward_token: Tensor, step: int, state: Tensor) -> tuple[Tensor, ...]:
        """Return rotated queries [N, Hq, d] for states g_k [N, D].

        From step 1 on also the rows' diagonal: rotated keys and plain values, each [N, Hkv, d]. (The keys of
        step 0 are among K_0.)
        """
        return _Step.apply(self, step, backward_token, state)

    def heads(self, step: int) -> list[int]:
        """Return the numbers of heads of q at step 0, of q, k and v later."""
        return [self.query_heads, self.kv_heads, self.kv_heads][: 3 if step else 1]

    def split(self, raw: Tensor) -> list[Tensor]:
        """View the columns of one or three projections [n, *] as tensors [n, heads, d]."""
        heads = self.heads(raw.shape[1] > self.query_heads * self.head_dim)
        return list(raw.unflatten(-1, (sum(heads), self.head_dim)).split(heads, 1))

    def rotate(
        self, to: list[Tensor], parts: list[Tensor], step: int, rows: slice, *, back: bool = False
    ) -> None:
        """Write q and k of ``rows``, rotated for ``step`` or back, and v unchanged.

        Without a rotation, all three are written unchanged.
        """
        rotated = 0
        if self.rotation is not None:
            angles, rotated = self.rotation(self.positions[rows] + step), 2
            for y, x in zip(to[:2], parts[:2], strict=True):
                self.operations.rotate_into(y, x, *angles, back=back)
        for y, x in zip(to[rotated:], parts[rotated:], strict=True):
            copy_rows(y, x)

    @property
    def weights(self) -> ProjectionWeights:
        """The weights given to ``begin``."""
        assert self._weights is not None, "call begin first; a second backward finds nothing"
        return self._weights

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums over steps, in float32 at least: d table, dW_g, and d of the state norm's weight.

        Allocated by the first backward of a step: by then the loss has freed its memory.
        """
        if self._sums is None:
            weight = self.weights.weight
            columns, width = weight.shape
            shapes = (self._tokens, columns), (columns, width // 2), (width // 2,)
            self._sums = tuple(weight.new_zeros(shape, dtype=wide(weight.dtype)) for shape in shapes)
        return self._sums

    def norm_tokens(self, tokens: Tensor, rows: Tensor | None, tile: slice) -> Tensor:
        """Return norm(e) [n, D] for one tile of n tokens."""
        norm = self.weights.token_norm
        if rows is None:
            return self.operations.rms_norm(tokens[tile], norm, self.eps)
        ids = rows[tile]
        normed = tokens.new_empty(len(ids), tokens.shape[1])
        return self.operations.norm_rows_into(normed, 0, tokens, ids, norm, self.eps)


class _Begin(torch.autograd.Function):
    """Forward: compute the table. Backward: compute dW_e and d norm(e), and return the sums over the steps.

    The forward returns the backward token, so autograd runs this backward after those of all steps.
    """

    @staticmethod
    def forward(
        ctx: Any, steps: StepProjections, tokens: Tensor, rows: Tensor | None, *_parameters: Tensor | None
    ) -> Tensor:
        # The parameters are inputs only to receive gradients; their values come from ``steps.weights``.
        weight, bias, norm, _ = steps.weights
        first = weight[:, : len(norm)]  # W_e
        steps.table = weight.new_empty(len(tokens if rows is None else rows), len(weight))
        for tile in _tiles(len(steps.table)):
            torch.mm(steps.norm_tokens(tokens, rows, tile), first.t(), out=steps.table[tile])
        if bias is not None:
            steps.table += bias
        # Keep a frozen table as an attribute and save only the row numbers. It is no activation, so
        # offloading must not see it.
        ctx.steps, ctx.table = steps, None if rows is None else tokens
        ctx.save_for_backward(tokens if rows is None else rows)
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        tokens, rows = (saved, None) if ctx.table is None else (ctx.table, saved)
        steps: StepProjections = ctx.steps
        weight, bias, norm, _ = steps.weights
        d_table, d_second, d_state_norm = steps.sums()
        d_first, d_norm = torch.zeros_like(d_second), torch.zeros_like(d_state_norm)
        d_tokens = torch.empty_like(tokens) if ctx.needs_input_grad[1] else None
        for tile in _tiles(len(d_table)):
            d = d_table[tile].to(weight.dtype)
            steps.operations.add_product(d_first, d.t(), steps.norm_tokens(tokens, rows, tile))
            source, ids = (tokens[tile], None) if rows is None else (tokens, rows[tile])
            d_normed, d_part = d @ weight[:, : len(norm)], None if d_tokens is None else d_tokens[tile]
            norm_gradients = steps.operations.rms_norm_gradients
            d_norm += norm_gradients(d_normed, source, norm, steps.eps, ids, dx=d_part)
        steps._weights = steps._sums = None  # free both: this was the last reader
        d_bias = None if bias is None else d_table.sum(0)
        gradients = (torch.cat([d_first, d_second], 1), d_bias, d_norm, d_state_norm)
        return None, d_tokens, None, *(g if g is None else g.to(weight.dtype) for g in gradients)


class _Step(torch.autograd.Function):
    """One TTT step. The backward returns d g_k, and adds to the sums of `StepProjections`."""

    @staticmethod
    def forward(
        ctx: Any, steps: StepProjections, step: int, backward_token: Tensor, state: Tensor
    ) -> tuple[Tensor, ...]:
        assert steps.table is not None, "call begin, then each step in order, once"
        weight, _, _, norm = steps.weights
        heads, index = steps.heads(step), steps.token_index[step]
        # Step 0 needs q only: the first rows of the weights, and the first columns of the table.
        columns = sum(heads) * steps.head_dim
        second = weight[:columns, len(norm) :]  # W_g
        made = tuple(state.new_empty(len(state), n, steps.head_dim) for n in heads)
        for tile in _tiles(len(state)):
            raw = steps.operations.take_rows(steps.table, index[tile], columns)
            raw.addmm_(steps.operations.rms_norm(state[tile], norm, steps.eps), second.t())
            steps.rotate([part[tile] for part in made], steps.split(raw), step, tile)
        if step + 1 == len(steps.token_index):
            steps.table = None
        ctx.steps, ctx.step = steps, step
        ctx.save_for_backward(state)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        steps: StepProjections = ctx.steps
        (state,) = ctx.saved_tensors
        weight, _, _, norm = steps.weights
        d_table, d_second, d_norm = steps.sums()
        index, columns = steps.token_index[ctx.step], sum(steps.heads(ctx.step)) * steps.head_dim
        second, d_state = weight[:columns, len(norm) :], torch.empty_like(state)
        for tile in _tiles(len(state)):
            x = state[tile]
            d = state.new_empty(len(x), columns)
            steps.rotate(steps.split(d), [g[tile] for g in gradients], ctx.step, tile, back=True)
            steps.operations.add_rows(d_table, index[tile], d)
            # Recompute norm(g); it is freed as soon as it has been used.
            operations = steps.operations
            operations.add_product(d_second[:columns], d.t(), operations.rms_norm(x, norm, steps.eps))
            d_norm += operations.rms_norm_gradients(d @ second, x, norm, steps.eps, dx=d_state[tile])
        return None, None, d_state.new_zeros(()), d_state


def _tiles(rows: int) -> Iterator[slice]:
    """Divide rows into tiles of ``tile_rows``."""
    size = tile_rows(rows)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
