"""The EAGLE-3 draft (arXiv:2503.01840): its modules, and the test-time-training (TTT) unroll over them.

Parameter names are those of the serving engines, except in the head: ``head.norm_weight`` is served as
``norm.weight`` and ``head.weight`` as ``lm_head.weight``. The fused loss reads both, and ZeRO-3 gathers
parameters module by module, so they are in one module.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from eagle_ds.data.batch import Batch
from eagle_ds.kernels.backend import operations_for
from eagle_ds.kernels.linear import ChainedLinear, CopyableLinear, ResidualLinear
from eagle_ds.kernels.rope import inverse_frequencies, rotation
from eagle_ds.model.arch import DraftArch
from eagle_ds.model.offload import ActivationOffload
from eagle_ds.model.projections import ProjectionWeights, StepProjections
from eagle_ds.model.ttt import PrefixAttention
from eagle_ds.sharding.tiles import tile_rows

HeadLoss = Callable[[list[Tensor], Tensor, Tensor, float], Any]
"""Maps (T states [N, D], norm weight [D], head weight [Vd, D], eps) to (differentiable loss, metric sums)."""

WeightAndBias = tuple[Tensor, Tensor | None]
"""Copies of (weight, bias or None) of several projections, concatenated by rows."""

Recompute = Literal["none", "selective", "mlp", "full"]
"""What the backward recomputes. Per-step q, k and v are never recomputed; only their input norm is.

    none       nothing
    selective  everything except the results of matmuls
    mlp        the output projection and the MLP
    full       the same and K_0/V_0 of the context rows; queries are sent between ranks a second time
"""


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return operations_for(x).rms_norm(x, weight, eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (arXiv:1910.07467).

    All methods read the weight inside ``forward``: with ZeRO-3 it exists only there (kernels/linear.py).
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, *inputs: Tensor, compute: Callable[..., Tensor] = _rms_norm) -> Tensor:
        """Return ``compute(*inputs, weight, eps)``, by default the norm of x [M, width]."""
        return compute(*inputs, self.weight, self.eps)

    def write_into(self, z: Tensor, column: int, x: Tensor) -> Tensor:
        """Overwrite the columns of z [M, *] from ``column`` on with the norm of x [M, width]; return z."""
        return self(x, compute=partial(operations_for(z).norm_into, z, column))

    def write_rows_into(self, z: Tensor, column: int, table: Tensor, rows: Tensor) -> Tensor:
        """Do ``write_into`` with x = table[rows], for a frozen table; no copy of the rows is made."""
        norm_rows = operations_for(z).norm_rows_into
        return self(table, compute=lambda x, weight, eps: norm_rows(z, column, x, rows, weight, eps))

    def copy_weight(self) -> Tensor:
        """Return a differentiable copy of the weight [width]."""
        return self(compute=lambda weight, _: weight.clone())


class SharedEmbedding(nn.Module):
    """The target's embedding table, frozen. It is a buffer, so neither optimizer nor checkpoint holds it."""

    weight: Tensor

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(vocab_size, width), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up int64 ids [...]; return [..., width]."""
        return F.embedding(ids, self.weight)


class DraftAttention(nn.Module):
    """Projections of the attention layer. The input of q, k and v is [embedding ; state], 2D wide."""

    def __init__(self, arch: DraftArch) -> None:
        super().__init__()
        width = 2 * arch.hidden_size
        d, bias = arch.head_dim, arch.attention_bias
        self.heads, self.kv_heads = arch.num_attention_heads, arch.num_key_value_heads
        self.head_dim = d
        self.q_proj = CopyableLinear(width, arch.num_attention_heads * d, bias=bias)
        self.k_proj = CopyableLinear(width, arch.num_key_value_heads * d, bias=bias)
        self.v_proj = CopyableLinear(width, arch.num_key_value_heads * d, bias=bias)
        self.o_proj = ResidualLinear(arch.num_attention_heads * d, arch.hidden_size, bias=bias)
        self.q_norm = RMSNorm(d, arch.rms_norm_eps) if arch.qk_norm else None
        self.k_norm = RMSNorm(d, arch.rms_norm_eps) if arch.qk_norm else None
        self.frequencies, self.rope_factor = inverse_frequencies(d, arch.rope_theta, arch.rope_scaling)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return (cos, sin) [M, 1, d/2] for int64 positions [M]: float64 for float64 models, else float32."""
        self.frequencies = self.frequencies.to(positions.device)
        angle_dtype = torch.promote_types(dtype, torch.float32)
        return rotation(positions, self.frequencies, self.rope_factor, angle_dtype)

    def copy_projections(self) -> WeightAndBias:
        """Return copies of weight [(Hq + 2 Hkv) d, 2D] and bias of q, k and v, concatenated by rows."""
        copies = [projection.copy_parameters() for projection in (self.q_proj, self.k_proj, self.v_proj)]
        weights, biases = zip(*copies, strict=True)
        return torch.cat(weights), None if biases[0] is None else torch.cat(biases)

    def project_q(self, z: Tensor, positions: Tensor) -> Tensor:
        """Map z [M, 2D] to rotated queries [M, Hq, d]."""
        return self.rotate(self.q_proj(z).unflatten(-1, (self.heads, self.head_dim)), self.q_norm, positions)

    def rotate(self, x: Tensor, norm: RMSNorm | None, positions: Tensor) -> Tensor:
        """Rotate heads x [M, heads, d]. ``norm`` is applied to each head first (None: there is none)."""
        if norm is not None:
            x = norm(x.flatten(0, 1)).view_as(x)
        return operations_for(x).rope(x, *self.rotation(positions, x.dtype))

    def project_kv(
        self, z: Tensor, positions: Tensor, kv_weights: WeightAndBias | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map z [M, 2D] to rotated keys and plain values, each [M, Hkv, d].

        ``kv_weights``: copied weights of k and v, concatenated; then one matmul computes both.
        """
        if kv_weights is None:
            k, v = self.k_proj(z), self.v_proj(z)
        else:
            k, v = F.linear(z, *kv_weights).chunk(2, dim=-1)
        k, v = (x.unflatten(-1, (self.kv_heads, self.head_dim)) for x in (k, v))
        return self.rotate(k, self.k_norm, positions), v


class DraftMLP(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, arch: DraftArch) -> None:
        super().__init__()
        self.gate_proj = ChainedLinear(arch.hidden_size, arch.intermediate_size, bias=False)
        self.up_proj = nn.Linear(arch.hidden_size, arch.intermediate_size, bias=False)
        self.down_proj = ResidualLinear(arch.intermediate_size, arch.hidden_size, bias=False)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return residual + MLP(x), each [M, D]."""
        gate, x = self.gate_proj(x)
        # Nothing else reads gate and up, so their gradients may overwrite them. That saves two tensors [M, I]
        # at the peak.
        product = operations_for(gate).swiglu(gate, self.up_proj(x), overwrite=True)
        return self.down_proj(product, residual)


class DraftLayer(nn.Module):
    """The decoder layer around its attention: call ``qkv_input`` before the attention, ``finish`` after."""

    def __init__(self, arch: DraftArch) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(arch.hidden_size, arch.rms_norm_eps)
        self.hidden_norm = RMSNorm(arch.hidden_size, arch.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(arch.hidden_size, arch.rms_norm_eps)
        self.norm_before_residual = arch.norm_before_residual
        self.self_attn = DraftAttention(arch)
        self.mlp = DraftMLP(arch)

    def copy_weights(self) -> ProjectionWeights:
        """Return copies of the weights that ``qkv_input`` and the q, k and v projections compute with."""
        norms = self.input_layernorm.copy_weight(), self.hidden_norm.copy_weight()
        return ProjectionWeights(*self.self_attn.copy_projections(), *norms)

    def qkv_input(self, embedding: Tensor, state: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return z [M, 2D] = [norm(e) ; norm(g)] for the state g [M, D].

        Without ``ids``, e is ``embedding`` [M, D]. With them, e is the rows ``ids`` [M] of the frozen table
        ``embedding`` [V, D].
        """
        width = state.shape[-1]
        z = state.new_empty(*state.shape[:-1], 2 * width)
        if ids is None:
            z = self.input_layernorm.write_into(z, 0, embedding)
        else:
            z = self.input_layernorm.write_rows_into(z, 0, embedding, ids)
        return self.hidden_norm.write_into(z, width, state)

    def finish(self, state: Tensor, attended: Tensor) -> Tensor:
        """Map state g_k [M, D] and attention output [M, Hq, d] to g_{k+1} [M, D].

        Both residuals are states before their norm; with ``norm_before_residual`` the first is the normed
        state.
        """
        if self.norm_before_residual:
            state = self.hidden_norm(state)
        state = self.self_attn.o_proj(attended.flatten(1), state)
        return self.mlp(self.post_attention_layernorm(state), state)


class DraftHead(nn.Module):
    """Final norm and the matrix to the draft vocabulary."""

    def __init__(self, arch: DraftArch) -> None:
        super().__init__()
        self.norm_weight = nn.Parameter(torch.ones(arch.hidden_size))
        self.weight = nn.Parameter(torch.empty(arch.draft_vocab_size, arch.hidden_size))
        self.eps = arch.rms_norm_eps
        nn.init.normal_(self.weight, std=arch.hidden_size**-0.5)

    def norm(self, state: Tensor) -> Tensor:
        """Apply the final norm to states [M, D]."""
        return _rms_norm(state, self.norm_weight, self.eps)

    def logits(self, state: Tensor) -> Tensor:
        """Return logits [M, Vd] of states [M, D] before the final norm."""
        return F.linear(self.norm(state), self.weight)

    def forward(self, states: list[Tensor], loss: HeadLoss) -> Any:
        """Return ``loss(states, norm_weight, weight, eps)`` for the T states [N, D] of the unroll.

        The loss runs inside this call, because ZeRO-3 gathers both weights only for the call of this module.
        """
        return loss(states, self.norm_weight, self.weight, self.eps)


class Eagle3Draft(nn.Module):
    """The draft. ``forward`` runs one micro-batch of test-time training: `unroll`, then the head's loss."""

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
            norms = (RMSNorm(arch.target_hidden_size, arch.rms_norm_eps) for _ in range(arch.num_aux))
            self.fc_norm = nn.ModuleList(norms)
        self.fc = nn.Linear(width, arch.hidden_size, bias=False)
        self.midlayer = DraftLayer(arch)
        self.head = DraftHead(arch)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise linear layers from a normal distribution with standard deviation 1 / sqrt(fan-in)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def fuse(self, aux: Tensor) -> Tensor:
        """Map auxiliary states [M, A*H] of the target to g_0 [M, D]."""
        if self.arch.norm_before_fc:
            aux = self.input_norm(aux)
        if self.arch.fc_norm:
            parts = aux.chunk(self.arch.num_aux, dim=-1)
            aux = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(aux)

    def next_state(self, state: Tensor) -> Tensor:
        """Map the layer's output g [M, D] to the next TTT step's input; EAGLE-3.1 norms it."""
        return self.head.norm(state) if self.arch.norm_output else state

    def forward(
        self, batch: Batch, prefix: PrefixAttention, loss: HeadLoss, recompute: Recompute = "none",
        offload: ActivationOffload | None = None,
    ) -> Any:  # fmt: skip
        """Return ``loss`` of the T states of one micro-batch. Collective over the sequence-parallel group."""
        return self.head(self.unroll(batch, prefix, recompute, offload), loss)

    def unroll(
        self, batch: Batch, prefix: PrefixAttention, recompute: Recompute = "none",
        offload: ActivationOffload | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Return [g_1 .. g_T] of the query rows, each [N, D], before the final norm. Collective.

        With ``offload`` the tensors saved for the backward go to host memory, except the batch's own.
        """
        fused = self.fuse(batch.aux)
        with offload.saving() if offload else nullcontext():
            return self._unroll(batch, prefix, fused, recompute, offload.stay if offload else lambda *_: None)

    def _unroll(
        self, batch: Batch, prefix: PrefixAttention, fused: Tensor, recompute: Recompute,
        stay: Callable[..., None],
    ) -> list[Tensor]:  # fmt: skip
        """Run all TTT steps.

        ``stay(*tensors)`` keeps tensors on the device: those that the last step's backward reads first.
        """
        # Copy the projections' weights once. All TTT steps use them outside of the modules' calls, where
        # ZeRO-3 would have freed them.
        weights = self.midlayer.copy_weights()
        stay(weights.weight)
        # Compute K_0/V_0 of all context rows and send them once. The rows of k and v follow those of q in
        # the concatenated weights.
        q_rows = self.arch.num_attention_heads * self.arch.head_dim
        kv_weights = weights.weight[q_rows:], None if weights.bias is None else weights.bias[q_rows:]
        rows = (_select(fused, batch.context_index), batch.context_ids, batch.context_positions)
        kv_recompute = "none" if recompute == "mlp" else recompute
        project_kv = partial(self.context_kv, kv_weights)
        backward_token = prefix.share_keys(*self._in_tiles(kv_recompute, project_kv, *rows))
        # Compute the token half of q, k and v once for all steps (projections.py). It has a backward token
        # of its own.
        project = self._step_projections(batch)
        projection_token = project.begin(*self._tokens(batch.token_ids), weights)
        # From here on there are query rows only. Step k maps g_k to g_{k+1}, and its keys join the diagonals
        # of later steps.
        state = _select(fused, batch.query_index)
        states, diagonals = [], []
        for step in range(batch.sharding.ttt_steps):
            q, *kv = self._rotated(project(projection_token, step, state), batch.query_positions + step)
            diagonals += kv
            stay(*kv)
            attended = prefix.attend(backward_token, step, q, diagonals)
            states.append(self._finish(state, attended, recompute))
            state = self.next_state(states[-1])
        return states

    def _rotated(self, parts: tuple[Tensor, ...], positions: Tensor) -> tuple[Tensor, ...]:
        """Norm and rotate q and k of one step, if the draft norms them. Otherwise they are rotated.

        Args:
            parts: q, and from step 1 on also k and v, each [N, heads, d].
            positions: rope positions of the rows at this step, int64 [N].
        """
        if not self.arch.qk_norm:
            return parts
        attention = self.midlayer.self_attn
        norms = (attention.q_norm, attention.k_norm)
        rotated = (attention.rotate(x, norm, positions) for x, norm in zip(parts, norms, strict=False))
        return (*rotated, *parts[2:])

    def _step_projections(self, batch: Batch) -> StepProjections:
        arch, attention = self.arch, self.midlayer.self_attn
        rotation = None if arch.qk_norm else partial(attention.rotation, dtype=self.fc.weight.dtype)
        return StepProjections(
            batch.token_index, batch.query_positions, rotation,
            query_heads=arch.num_attention_heads, kv_heads=arch.num_key_value_heads, head_dim=arch.head_dim,
            eps=arch.rms_norm_eps,
        )  # fmt: skip

    def _tokens(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (embeddings [M, D], None), or for a frozen table (the table, ``ids`` [M])."""
        if isinstance(self.embed_tokens, SharedEmbedding):
            return self.embed_tokens.weight, ids
        return self.embed_tokens(ids), None

    def _in_tiles(
        self, recompute: Recompute, function: Callable[..., tuple[Tensor, ...]], *rows: Tensor,
        unread: int | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Return ``function(*rows)`` for [M, ...] inputs and outputs; with recomputation, tile by tile.

        Only one tile is recomputed at a time, so intermediate tensors (z, those of the MLP) never exist for
        all rows.

        Args:
            recompute: what to keep for the backward: everything ("none"), inputs and results of matmuls
                ("selective"), or inputs only.
            function: called once for each tile.
            rows: inputs with the same M.
            unread: inner dimension of the one matmul whose result no backward reads. "selective" does not
                keep that result.
        """
        if recompute == "none":
            return function(*rows)
        contexts = partial(create_selective_checkpoint_contexts, _save_matmuls_except(unread))
        options = {"context_fn": contexts} if recompute == "selective" else {}
        # Non-reentrant, because the reentrant kind would fire a parameter's gradient hooks T times,
        # which breaks ZeRO.
        run = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False, **options)
        done = [run(*tile) for tile in zip(*(x.split(tile_rows(len(x))) for x in rows), strict=True)]
        return done[0] if len(done) == 1 else tuple(torch.cat(parts) for parts in zip(*done, strict=True))

    def _finish(self, state: Tensor, attended: Tensor, recompute: Recompute) -> Tensor:
        """Apply the layer's second half; nothing reads the result of ``down_proj`` in the backward."""
        mode: Recompute = "full" if recompute == "mlp" else recompute
        return self._in_tiles(mode, self._finish_tile, state, attended, unread=self.arch.intermediate_size)[0]

    def _finish_tile(self, state: Tensor, attended: Tensor) -> tuple[Tensor]:
        return (self.midlayer.finish(state, attended),)

    def qkv_input(self, ids: Tensor, state: Tensor) -> Tensor:
        """Return z [M, 2D] for the tokens ``ids`` [M] and states [M, D]."""
        tokens, rows = self._tokens(ids)
        return self.midlayer.qkv_input(tokens, state, rows)

    def context_kv(
        self, kv_weights: WeightAndBias, state: Tensor, ids: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return K_0 and V_0 [M, Hkv, d] of rows with fused states [M, D] and next tokens ``ids`` [M]."""
        return self.midlayer.self_attn.project_kv(self.qkv_input(ids, state), positions, kv_weights)


def _select(rows: Tensor, index: Tensor | None) -> Tensor:
    """Return ``rows[index]``, or ``rows`` itself, without a copy, if there is no index."""
    return rows if index is None else rows[index]


def _save_matmuls_except(inner: int | None) -> Callable[..., CheckpointPolicy]:
    """Return a checkpoint policy: save results of matmuls, except those with inner dimension ``inner``."""
    matmuls = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)

    def policy(_context: Any, op: Any, *inputs: Any, **_options: Any) -> CheckpointPolicy:
        # The last input of mm and addmm is the right matrix [inner, out].
        save = op in matmuls and inputs[-1].shape[0] != inner
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
