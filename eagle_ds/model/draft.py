"""The EAGLE-3 draft (arXiv:2503.01840): building blocks, and the test-time-training unroll over them.

Parameter names are the serving engines' own, but for the head, whose norm and matrix live in one module
(``head.norm_weight`` is served as ``norm.weight``, ``head.weight`` as ``lm_head.weight``) because the fused loss reads
both, and ZeRO-3 gathers parameters module by module.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from eagle_ds.data.batch import Batch
from eagle_ds.kernels.elementwise import rope, swiglu
from eagle_ds.kernels.linear import LendingLinear, PassingLinear, ResidualLinear
from eagle_ds.kernels.norm import norm_into, rms_norm
from eagle_ds.kernels.rope import inverse_frequencies, rotation
from eagle_ds.model.arch import DraftArch
from eagle_ds.model.offload import ActivationOffload
from eagle_ds.model.projections import ProjectionWeights, StepProjections
from eagle_ds.model.ttt import PrefixAttention
from eagle_ds.sharding.tiles import tile_rows

HeadLoss = Callable[[list[Tensor], Tensor, Tensor, float], Any]
"""(T states [N, D], norm weight [D], head weight [Vd, D], eps) -> a differentiable loss and what goes with it."""

Lent = tuple[Tensor, Tensor | None]
"""(weight, bias or None) of projections, one below the other: copies that outlive their modules' calls."""

Recompute = Literal["none", "selective", "mlp", "full"]
"""What is computed again in the backward: nothing; everything but matmuls, whose results are kept; the MLP and output
projection; also K_0 and V_0 of the context rows, and queries are exchanged again. Of the steps' own q, k and v nothing is ever
computed again but a norm."""


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor | None = None, into: Tensor | None = None, column: int = 0, rows: Tensor | None = None) -> Tensor:
        """[M, width] -> [M, width]; or ``into`` [M, *] with these columns of it overwritten, see ``norm_into``; or, called with
        nothing, a copy of the weight, as ``LendingLinear`` does."""
        if x is None:
            return self.weight.clone()
        if into is None:
            return rms_norm(x, self.weight, self.eps)
        return norm_into(into, column, x, self.weight, self.eps, rows)


class SharedEmbedding(nn.Module):
    """The target's embedding table, frozen: a buffer, so neither optimizer nor checkpoint carries it."""

    weight: Tensor

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(vocab_size, width), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., width]."""
        return F.embedding(ids, self.weight)


class DraftAttention(nn.Module):
    """Projections of the attention layer; q, k and v read the 2D wide [embedding ; state]."""

    def __init__(self, arch: DraftArch) -> None:
        super().__init__()
        width, d, bias = 2 * arch.hidden_size, arch.head_dim, arch.attention_bias
        self.heads, self.kv_heads, self.head_dim = arch.num_attention_heads, arch.num_key_value_heads, d
        self.q_proj = LendingLinear(width, arch.num_attention_heads * d, bias=bias)
        self.k_proj = LendingLinear(width, arch.num_key_value_heads * d, bias=bias)
        self.v_proj = LendingLinear(width, arch.num_key_value_heads * d, bias=bias)
        self.o_proj = ResidualLinear(arch.num_attention_heads * d, arch.hidden_size, bias=bias)
        self.frequencies, self.rope_factor = inverse_frequencies(d, arch.rope_theta, arch.rope_scaling)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin) [M, 1, d/2] for int64 positions [M], float32 (float64 for float64 models)."""
        self.frequencies = self.frequencies.to(positions.device)
        return rotation(positions, self.frequencies, self.rope_factor, torch.promote_types(dtype, torch.float32))

    def lend(self) -> Lent:
        """Weight [(Hq + 2 Hkv) d, 2D] and bias of q, k and v, one below the other."""
        weights, biases = zip(*(projection() for projection in (self.q_proj, self.k_proj, self.v_proj)), strict=True)
        return torch.cat(weights), None if biases[0] is None else torch.cat(biases)

    def project_q(self, z: Tensor, positions: Tensor) -> Tensor:
        """z [M, 2D] -> rotated queries [M, Hq, d]."""
        return rope(self.q_proj(z).unflatten(-1, (self.heads, self.head_dim)), *self.rotation(positions, z.dtype))

    def project_kv(self, z: Tensor, positions: Tensor, lent: Lent | None = None) -> tuple[Tensor, Tensor]:
        """z [M, 2D] -> rotated keys and plain values, each [M, Hkv, d]; in one matmul where weights of both are ``lent`` already."""
        k, v = (self.k_proj(z), self.v_proj(z)) if lent is None else F.linear(z, *lent).chunk(2, dim=-1)
        heads = (self.kv_heads, self.head_dim)
        return rope(k.unflatten(-1, heads), *self.rotation(positions, z.dtype)), v.unflatten(-1, heads)


class DraftMLP(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, arch: DraftArch) -> None:
        super().__init__()
        self.gate_proj = PassingLinear(arch.hidden_size, arch.intermediate_size, bias=False)
        self.up_proj = nn.Linear(arch.hidden_size, arch.intermediate_size, bias=False)
        self.down_proj = ResidualLinear(arch.intermediate_size, arch.hidden_size, bias=False)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x and what the result is added to, [M, D] -> [M, D]."""
        gate, x = self.gate_proj(x)
        return self.down_proj(swiglu(gate, self.up_proj(x), spent=True), residual)


class DraftLayer(nn.Module):
    """The decoder layer, cut where attention goes: ``qkv_input`` before it, ``finish`` after it."""

    def __init__(self, arch: DraftArch) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(arch.hidden_size, arch.rms_norm_eps)
        self.hidden_norm = RMSNorm(arch.hidden_size, arch.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(arch.hidden_size, arch.rms_norm_eps)
        self.self_attn = DraftAttention(arch)
        self.mlp = DraftMLP(arch)

    def lend(self) -> ProjectionWeights:
        """Copies of what ``qkv_input`` and the projections behind it compute with."""
        return ProjectionWeights(*self.self_attn.lend(), self.input_layernorm(), self.hidden_norm())

    def qkv_input(self, embedding: Tensor, state: Tensor, ids: Tensor | None = None) -> Tensor:
        """Embedding e [M, D], or the rows ``ids`` [M] of a frozen table [V, D], and state g [M, D] -> z [M, 2D], embedding first."""
        width = state.shape[-1]
        z = state.new_empty(*state.shape[:-1], 2 * width)
        z = self.input_layernorm(embedding, into=z, rows=ids)
        return self.hidden_norm(state, into=z, column=width)

    def finish(self, state: Tensor, attended: Tensor) -> Tensor:
        """State g_k [M, D] and attention output [M, Hq, d] -> g_{k+1} [M, D]; both residuals are un-normed states."""
        state = self.self_attn.o_proj(attended.flatten(1), state)
        return self.mlp(self.post_attention_layernorm(state), state)


class DraftHead(nn.Module):
    """Final norm and draft-vocabulary matrix. With ``norm_output`` the states that reach it are normed already."""

    def __init__(self, arch: DraftArch) -> None:
        super().__init__()
        self.norm_weight = nn.Parameter(torch.ones(arch.hidden_size))
        self.weight = nn.Parameter(torch.empty(arch.draft_vocab_size, arch.hidden_size))
        self.eps = arch.rms_norm_eps
        nn.init.normal_(self.weight, std=arch.hidden_size**-0.5)

    def norm(self, state: Tensor) -> Tensor:
        """[M, D] -> [M, D]."""
        return rms_norm(state, self.norm_weight, self.eps)

    def logits(self, state: Tensor) -> Tensor:
        """Un-normed state [M, D] -> logits [M, Vd]."""
        return F.linear(self.norm(state), self.weight)

    def forward(self, states: list[Tensor], loss: HeadLoss) -> Any:
        """``loss(states, norm_weight, weight, eps)`` over the T un-normed states [N, D] of the unroll."""
        return loss(states, self.norm_weight, self.weight, self.eps)


class Eagle3Draft(nn.Module):
    """The draft. ``forward`` runs one micro-batch of test-time training; the other methods are its parts."""

    def __init__(self, arch: DraftArch) -> None:
        super().__init__()
        self.arch = arch
        width = arch.num_aux * arch.target_hidden_size
        if arch.trains_embedding:
            self.embed_tokens: nn.Module = nn.Embedding(arch.target_vocab_size, arch.hidden_size)
            nn.init.normal_(self.embed_tokens.weight, std=0.02)
        else:
            self.embed_tokens = SharedEmbedding(arch.target_vocab_size, arch.hidden_size)
        if arch.norm_before_fc:
            self.input_norm = RMSNorm(width, arch.rms_norm_eps)
        if arch.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(arch.target_hidden_size, arch.rms_norm_eps) for _ in range(arch.num_aux))
        self.fc = nn.Linear(width, arch.hidden_size, bias=False)
        self.midlayer = DraftLayer(arch)
        self.head = DraftHead(arch)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal init of the linear layers, scaled by fan-in as target models' own are."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def fuse(self, aux: Tensor) -> Tensor:
        """Auxiliary states [M, A*H] -> g_0 [M, D]."""
        if self.arch.norm_before_fc:
            aux = self.input_norm(aux)
        if self.arch.fc_norm:
            parts = aux.chunk(self.arch.num_aux, dim=-1)
            aux = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(aux)

    def hand_on(self, state: Tensor) -> Tensor:
        """Output of the layer -> what the next step starts from (EAGLE-3.1 norms it)."""
        return self.head.norm(state) if self.arch.norm_output else state

    def forward(
        self, batch: Batch, prefix: PrefixAttention, loss: HeadLoss, recompute: Recompute = "none", offload: ActivationOffload | None = None
    ) -> Any:
        """What ``loss`` makes of the T states of one micro-batch. Collective over the sequence-parallel group."""
        return self.head(self.unroll(batch, prefix, recompute, offload), loss)

    def unroll(
        self, batch: Batch, prefix: PrefixAttention, recompute: Recompute = "none", offload: ActivationOffload | None = None
    ) -> list[Tensor]:
        """[g_1 .. g_T] of the query rows, each [N, D], before the final norm. K_0/V_0 are computed for context rows only.

        With ``offload``, what all of it leaves for the backward goes to host memory, but for the batch's own rows."""
        fused = self.fuse(batch.aux)
        if offload is None:
            return self._unroll(batch, prefix, fused, recompute)
        with offload.saving():
            return self._unroll(batch, prefix, fused, recompute, offload.stay)

    def _unroll(
        self, batch: Batch, prefix: PrefixAttention, fused: Tensor, recompute: Recompute, stay: Callable[..., None] | None = None
    ) -> list[Tensor]:
        """``stay`` is told of the weights lent, and of the diagonal keys and values, all of which the last step's backward reads first."""
        again = "none" if recompute == "mlp" else recompute
        weights = self.midlayer.lend()
        if stay:
            stay(weights.weight)
        keys_at = self.arch.num_attention_heads * self.arch.head_dim
        lent = weights.weight[keys_at:], None if weights.bias is None else weights.bias[keys_at:]
        rows = (_pick(fused, batch.context_index), batch.context_ids, batch.context_positions)
        backward_token = prefix.share_keys(*self._in_tiles(again, partial(self.context_kv, lent), *rows))
        project = self._step_projections(batch)
        begun = project.begin(*self._tokens(batch.token_ids), weights)
        state, states, diagonals = _pick(fused, batch.query_index), [], []
        for step in range(batch.sharding.ttt_steps):
            q, *kv = project(begun, step, state)
            diagonals += kv
            if stay:
                stay(*kv)
            attended = prefix.attend(backward_token, step, q, diagonals)
            raw = self._finish(state, attended, recompute)
            states.append(raw)
            state = self.hand_on(raw)
        return states

    def _step_projections(self, batch: Batch) -> StepProjections:
        arch, attention = self.arch, self.midlayer.self_attn
        return StepProjections(
            batch.token_index,
            batch.query_positions,
            partial(attention.rotation, dtype=self.fc.weight.dtype),
            query_heads=arch.num_attention_heads,
            kv_heads=arch.num_key_value_heads,
            head_dim=arch.head_dim,
            eps=arch.rms_norm_eps,
        )

    def _tokens(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """(embeddings [M, D], None), or (a frozen table, the rows ``ids`` [M] of it)."""
        if isinstance(self.embed_tokens, SharedEmbedding):
            return self.embed_tokens.weight, ids
        return self.embed_tokens(ids), None

    def _run(self, recompute: Recompute, function: Callable[..., Any], *inputs: Any, unread: int | None = None) -> Any:
        """Call ``function``, keeping for the backward all that autograd wants, its matmuls' results, or its inputs alone.

        ``unread``: the matmul that sums over so many numbers has a result that no backward reads.
        """
        if recompute == "none":
            return function(*inputs)
        contexts = partial(create_selective_checkpoint_contexts, _all_matmuls_but(unread))
        context = {"context_fn": contexts} if recompute == "selective" else {}
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **context)

    def _in_tiles(
        self, recompute: Recompute, function: Callable[..., tuple[Tensor, ...]], *rows: Tensor, unread: int | None = None
    ) -> tuple[Tensor, ...]:
        """``function`` of [M, ...] tensors to [M, ...] tensors. What is recomputed is so a tile of rows at a time, so that neither
        the width of the MLP nor that of z ever meets all rows."""
        if recompute == "none":
            return function(*rows)
        tiles = zip(*(x.split(tile_rows(len(x))) for x in rows), strict=True)
        done = [self._run(recompute, function, *tile, unread=unread) for tile in tiles]
        return done[0] if len(done) == 1 else tuple(torch.cat(parts) for parts in zip(*done, strict=True))

    def _finish(self, state: Tensor, attended: Tensor, recompute: Recompute) -> Tensor:
        """The layer's second half."""
        again: Recompute = "full" if recompute == "mlp" else recompute
        return self._in_tiles(again, self._finished, state, attended, unread=self.arch.intermediate_size)[0]

    def _finished(self, state: Tensor, attended: Tensor) -> tuple[Tensor]:
        return (self.midlayer.finish(state, attended),)

    def qkv_input(self, ids: Tensor, state: Tensor) -> Tensor:
        """z [M, 2D] of the tokens ``ids`` [M] and states [M, D]."""
        tokens, rows = self._tokens(ids)
        return self.midlayer.qkv_input(tokens, state, rows)

    def context_kv(self, lent: Lent, state: Tensor, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """K_0, V_0 [M, Hkv, d] of rows with fused states [M, D] and next tokens ``ids`` [M]."""
        return self.midlayer.self_attn.project_kv(self.qkv_input(ids, state), positions, lent)


def _pick(rows: Tensor, index: Tensor | None) -> Tensor:
    """Some of the rows; no index means all of them, in place."""
    return rows if index is None else rows[index]


def _all_matmuls_but(inner: int | None) -> Callable[..., CheckpointPolicy]:
    """Policy of selective recomputation: keep matmuls' results, but those of one that sums over ``inner``."""

    def policy(_context: Any, op: Any, *inputs: Any, **_options: Any) -> CheckpointPolicy:
        matmul = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if matmul and inputs[-1].shape[0] != inner else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
