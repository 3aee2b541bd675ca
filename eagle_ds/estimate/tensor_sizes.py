"""Count the bytes of a training step's tensors, on an imagined rank that is busiest in every kind of row.

``TensorSizes`` has one method for each group of tensors; ``memory.py`` adds them up stage by stage. Every
method's docstring lists its tensors with their shapes on one rank. Letters such as ``D`` and ``Hq`` are
explained in ``eagle_ds/__init__.py``; ``I`` is the inner width of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from eagle_ds.config.recipe import Recipe
from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.heads import HeadSharding
from eagle_ds.sharding.sequence import SequenceSharding
from eagle_ds.sharding.tiles import LOSS_CHUNK_BYTES, loss_chunk_rows, tile_rows


@dataclass(frozen=True)
class Rows:
    """Row counts of one rank for one sequence."""

    context: int
    query: int
    aux: int  # rows whose auxiliary hidden states are read: context and query rows
    target: int
    attended_keys: int  # query-key pairs of one TTT step, of all query rows of the rank's Ulysses group

    @classmethod
    def of(cls, sharding: SequenceSharding) -> Rows:
        """Return the largest count of any rank, for each kind of row separately."""
        ranks = [cls.of_rank(sharding, rank) for rank in range(sharding.world)]
        return cls(*(max(counts) for counts in zip(*(vars(rows).values() for rows in ranks), strict=True)))

    @classmethod
    def of_rank(cls, sharding: SequenceSharding, rank: int) -> Rows:
        """Count the rows of ``rank``, numbered within its sequence-parallel group."""
        return cls(
            context=rg.count(sharding.context[rank]), query=rg.count(sharding.queries[rank]),
            aux=rg.count(sharding.aux_rows(rank)), target=rg.count(sharding.target_rows(rank)),
            attended_keys=sharding.attention_work(rank // sharding.ulysses),
        )


def draft_parameters(recipe: Recipe) -> dict[str, int]:
    """Count the trained parameters by part of the draft.

    Norms and biases are left out: thousands among hundreds of millions.
    """
    draft, hidden = recipe.draft, recipe.draft.hidden_size
    queries, keys = draft.num_attention_heads * draft.head_dim, draft.num_key_value_heads * draft.head_dim
    return {
        "fc": len(recipe.target.aux_ids) * recipe.target.hidden_size * hidden,  # [D, A*H]
        # W_q, W_k, W_v read 2D; W_o [D, Hq*d]
        "attention": 2 * hidden * (queries + 2 * keys) + queries * hidden,
        "mlp": 3 * hidden * draft.intermediate_size,  # gate, up, down
        "lm_head": draft.vocab_size * hidden,  # [Vd, D]
        # [V, D]; a draft with D = H shares the target's
        "embed_tokens": recipe.target.vocab_size * hidden if hidden != recipe.target.hidden_size else 0,
    }


def prefix_bytes(recipe: Recipe, rows: int, element: int, gradient: int = 4) -> int:
    """Return the bytes of K_0 and V_0 and of their gradients for ``rows`` rows and one rank's KV heads.

    Args:
        element: bytes of one element of K_0/V_0.
        gradient: bytes of one element of dK_0/dV_0, which are summed over the TTT steps in float32.
    """
    draft = recipe.draft
    heads = HeadSharding(draft.num_attention_heads, draft.num_key_value_heads, recipe.parallel.ulysses)
    return 2 * rows * heads.slots * draft.head_dim * (element + gradient)


class Saved(NamedTuple):
    """One number for each kind of tensor that autograd saves for the backward of a TTT step."""

    states: int = 0
    attention: int = 0
    diagonals: int = 0
    mlp: int = 0


NOTHING = Saved()


class TensorSizes:
    """Sizes of the step's tensors in bytes.

    Attributes named after one row hold the bytes of one row: ``state`` a state [D], ``query`` q [Hq*d],
    ``diagonal`` K_k and V_k [2*Hkv*d], ``inner`` a vector inside the MLP [I], ``embedding`` a trained
    embedding [D] (0 where it is frozen).
    """

    def __init__(
        self, recipe: Recipe, sharding: SequenceSharding, element: int, *, cpu: bool = False
    ) -> None:
        draft = recipe.draft
        self.recipe, self.sharding = recipe, sharding
        self.cpu = cpu
        self.rows = Rows.of(sharding)
        self.element = element  # bytes of a weight or activation
        self.wide = max(element, 4)  # bytes of a number in sums, which are float32 at least
        self.steps, self.recompute = recipe.training.ttt_steps, recipe.training.recompute
        self.parameters = draft_parameters(recipe)
        self.state = draft.hidden_size * element
        self.query = draft.num_attention_heads * draft.head_dim * element
        self.diagonal = 2 * draft.num_key_value_heads * draft.head_dim * element
        self.inner = draft.intermediate_size * element
        self.kept = self._kept_per_query_row()
        self.embedding = self.state if draft.hidden_size != recipe.target.hidden_size else 0
        # Rotation keeps one ring rank's rows of K_0/V_0; gather-once keeps those of the whole sequence.
        self.rotates = sharding.ring > 1 and sharding.ring_mode == "p2p"
        self.prefix_rows = -(-sharding.num_tokens // sharding.ring) if self.rotates else sharding.num_tokens
        self.prefix = prefix_bytes(recipe, self.prefix_rows, element, 0)  # K_0/V_0
        self.dkv = prefix_bytes(recipe, self.prefix_rows, 0)  # dK_0/dV_0 in float32
        self.tokens = self.rows.target + 1  # different tokens x[p+1+k] of all query rows and TTT steps
        # W_q, W_k and W_v are copied once per micro-batch into one matrix [(Hq + 2 Hkv) d, 2D].
        self.qkv_weights = (self.query + self.diagonal) * 2 * draft.hidden_size

    # Inputs, and what the forward keeps for the backward --------------------------------------------------

    def inputs(self) -> int:
        """Auxiliary hidden states [rows.aux, A*H] and target hidden states [rows.target, H]."""
        numbers = len(self.recipe.target.aux_ids) * self.rows.aux + self.rows.target
        return numbers * self.recipe.target.hidden_size * self.element

    def _kept_per_query_row(self) -> Saved:
        """Return the bytes that autograd keeps of one query row and TTT step, by kind of tensor.

        On a CPU elementwise operations are not fused, so more of their inputs are kept.
        """
        # Attention: q and the output, each [Hq*d], and the log-sum-exp [Hq] in float32. With Ulysses also a
        # copy of q with its heads sharded, unless the backward exchanges q again (recompute full).
        copies = 3 if self.sharding.ulysses > 1 and self.recompute != "full" else 2
        attention = copies * self.query + 4 * self.recipe.draft.num_attention_heads
        if self.recipe.draft.qk_norm:
            attention += self.query + self.diagonal // 2  # q and K_k before their norms
        mlp = 0  # recompute mlp or full: the MLP is recomputed from g_k and the attention output
        if self.recompute == "selective":
            mlp = self.state + 2 * self.inner  # output projection [D], gate [I], up [I]
        if self.recompute == "none":
            # Output projection [D], the norm's output [D], gate, up and their product [I]. Eager operations
            # also keep intermediate results of the norm and of SwiGLU.
            mlp = (4 if self.cpu else 2) * self.state + (4 if self.cpu else 3) * self.inner
        # States: g_k [D], which projections and MLP read. Diagonals: K_k and V_k, from TTT step 1 on.
        return Saved(states=self.state, attention=attention, diagonals=self.diagonal, mlp=mlp)

    def context_rows(self) -> int:
        """Count fc's output [rows.context, D], what the projections of K_0/V_0 keep, and trained embeddings.

        The projections keep nothing (recompute full), K_0 and V_0 (selective), or z [rows.context, 2D] and
        the angles cos and sin [rows.context, d] in float32. Eager operations also keep both norms' inputs.
        With qk_norm, K_0 is also kept before its norm.
        """
        angles = 2 * 2 * self.recipe.draft.head_dim
        whole = (4 if self.cpu else 2) * self.state + angles
        whole += self.diagonal // 2 if self.recipe.draft.qk_norm else 0
        projections = {"full": 0, "selective": self.diagonal}.get(self.recompute, whole)
        embedded = self.embedding if self.recompute in ("none", "mlp") else 0
        return self.rows.context * (self.state + projections + embedded) + self.tokens * self.embedding

    def first_states(self) -> int:
        """Count g_0 [N, D]: a copy of fc's output, unless context and query rows are the same rows."""
        shared = self.rows.query == self.rows.context == self.rows.aux
        return 0 if shared else self.rows.query * self.state

    def largest_kept(self) -> int:
        """Return the bytes of a query row in the largest tensor that moves to the host: g_k, q, or gate."""
        return max(self.state, self.query, self.inner if self.kept.mlp else 0)

    def token_gradients(self) -> int:
        """Count two gradients that are summed over the TTT steps in float32.

        They are the gradient of the projected tokens [tokens, (Hq + 2 Hkv) d], and dW_g [(Hq + 2 Hkv) d, D],
        that of the half of the weights that reads states.
        """
        columns = (self.query + self.diagonal) // self.element
        return columns * self.wide * (self.tokens + self.recipe.draft.hidden_size)

    # Workspace of each stage ------------------------------------------------------------------------------

    def offloaded_forward(self) -> int:
        """Count what the forward holds with offloaded activations.

        That is fc's output [rows.aux, D], two tensors that are being copied to the host, the MLP of one TTT
        step if it is kept, and the projected tokens [tokens, (Hq + 2 Hkv) d].
        """
        mlp = self.inner + self.state if self.recompute == "none" else 0
        row = 2 * self.largest_kept() + mlp
        return self.rows.aux * self.state + self.rows.query * row + self.tokens * (self.query + self.diagonal)

    def loss(self) -> int:
        """Count one chunk of C query rows, and the gradient of the head [Vd, D] in float32.

        A chunk holds logits and their gradients of all T TTT steps.
        """
        vocab, steps = self.recipe.draft.vocab_size, self.steps
        wide = self.wide
        # C: as many rows as the budget allows, a multiple of 256 if there are that many rows.
        budget = LOSS_CHUNK_BYTES["cpu" if self.cpu else "cuda"]
        chunk = min(self.rows.query, loss_chunk_rows(vocab, steps, self.element, budget))
        d_logits, labels = chunk * vocab * steps * self.element, chunk * vocab * wide  # [C*T, Vd], [C, Vd]
        # [C*T, D], [Vd, D]
        states, matrix = chunk * steps * self.state, vocab * self.recipe.draft.hidden_size
        # Forward: logits [C*T, Vd] in float32 (six such tensors where operations are not fused), states and
        # normed states.
        forward = d_logits + labels + (6 if self.cpu else 1) * chunk * vocab * steps * wide + 2 * states
        # Backward: states, normed states and both gradients, and the head's gradient of this chunk.
        backward = d_logits + labels + 4 * states + matrix * self.element
        return matrix * wide + max(forward, backward)

    def mlp(self) -> int:
        """Count the gradients inside the MLP. Those of gate and up overwrite gate and up."""
        rows, tile = self.rows.query, tile_rows(self.rows.query)
        if self.recompute == "none":
            return rows * (self.inner + self.state)  # the product's gradient [N, I], the input's [N, D]
        # One tile: the product and its gradient, and gate and up if they were not kept, each [tile, I]; the
        # norm's output, its gradient and the residual's, each [tile, D]. All rows done so far: the gradients
        # of g_k and of the attention output.
        inside = 2 if self.recompute == "selective" else 4
        in_tiles = (rows - tile) * (self.state + self.query) + tile * (inside * self.inner + 3 * self.state)
        # At the end the tiles' gradients exist next to their concatenation.
        return max(in_tiles, rows * (2 * self.state + 2 * self.query))

    def attention(self) -> int:
        """Return the largest of three moments: the kernel, the exchange through Ulysses, the diagonals."""
        rows, wide_query = self.rows.query, self.query // self.element * 4
        # With U > 1, dout and out are copied with their heads sharded, and so is q if it is exchanged again.
        copies = (3 if self.recompute == "full" else 2) * self.query if self.sharding.ulysses > 1 else 0
        prefix = self.dkv // 4 * self.element  # K_0/V_0, or one gradient of them in the activations' type
        if self.rotates:
            # dq in float32: the sum over all ring ranks, and the current rank's part. K/V are held twice
            # (current, arriving), dK/dV three times (current, arriving, leaving).
            kernel = rows * (2 * self.query + copies + 2 * wide_query) + 2 * prefix + 3 * self.dkv
        else:
            kernel = rows * (2 * self.query + copies + wide_query) + prefix  # dout, dq, and dq in float32
        exchange = rows * (2 + 2 * (copies > 0)) * self.query + rows * copies
        # dq, q and dout; dK_j/dV_j of all diagonals
        diagonals = rows * (3 * self.query + (self.steps - 1) * self.diagonal)
        return max(kernel, exchange, diagonals)

    def projections(self) -> int:
        """Count dq, dK_k and dV_k [N, (Hq + 2 Hkv) d], the state's gradient [N, D], copies of one tile."""
        projected = self.query + self.diagonal
        tile = tile_rows(self.rows.query) * (projected + 3 * self.state)
        return self.rows.query * (projected + self.state) + tile

    def token_projections(self) -> int:
        """Count the gradient of g_0 [N, D], and the backward of the weights' half that reads embeddings.

        The latter needs dW_e [(Hq + 2 Hkv) d, D] in float32, the joined gradient of both halves in float32
        and in the weights' type, and one tile of tokens: projected tokens, embeddings, normed embeddings.
        """
        numbers = self.qkv_weights // self.element
        tile = tile_rows(self.tokens) * (self.query + self.diagonal + 2 * self.state)
        return self.rows.query * self.state + numbers // 2 * 4 + numbers * (4 + self.element) + tile

    def exchange(self) -> int:
        """Count the gradients of fc's output [rows.aux, D], q, k, v weights and the rank's own K_0/V_0 rows.

        With several ranks, also a received and a summed copy of dK_0/dV_0 of all rows that the rank holds.
        """
        copies = 2 * self.dkv if self.sharding.world > 1 else 0
        gradients = self.rows.aux * self.state + self.qkv_weights + self.rows.context * self.diagonal
        return gradients + copies

    def context_forward(self) -> int:
        """Count fc's output [rows.aux, D], and the tensors from embedding to z of all rows, or of one tile.

        These are the embedding [D], both norms' outputs [D], and z [2D].
        """
        rows = self.rows.context if self.recompute in ("none", "mlp") else tile_rows(self.rows.context)
        return self.rows.aux * self.state + rows * 5 * self.state

    def context_backward(self) -> int:
        """Count the gradients of fc's output, the q, k, v weights and K_0/V_0, and z with its gradients."""
        rows, z = self.rows.context, max(2 * self.state + self.diagonal, 3 * self.state)
        if self.recompute in ("none", "mlp"):
            through_z = rows * z
        else:  # z is recomputed in tiles
            through_z = rows * (self.state + self.diagonal // 2) + tile_rows(rows) * (3 * self.state + z)
        return self.rows.aux * self.state + self.qkv_weights + rows * self.diagonal + through_z
