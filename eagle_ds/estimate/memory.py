"""What the busiest rank holds at each stage of a training step, tensor by tensor; the peak is the stage that holds most.

The letters are the legend of ``eagle_ds/__init__.py``, ``e`` is bytes per element. Of one query row every TTT step k keeps
for the backward: g_k, which its projections and its MLP start from; q, the attention's output and its log-sum-exp (under
Ulysses the head-sharded copy of q too, unless everything is recomputed); K_k and V_k. What projections make of the tokens
lies there during the forward, its gradient from the first backward of projections on. The last step's backward comes first,
while everything is still kept, so the stages that can be the peak are the loss over all T steps, the three parts of the last
step's backward (MLP, attention, projections), and, where few rows are trained, the backward of the tokens, the way home of
dK_0/dV_0 and the backward of the context rows.

Measured against torch.cuda.max_memory_allocated on H200s in ``tests/test_memory.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eagle_ds.config.deepspeed import bf16_enabled, offloads_optimizer, zero_stage
from eagle_ds.config.recipe import DraftConfig, Recipe
from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.sequence import SequenceSharding

GIB = 1 << 30
LOSS_CHUNK_BYTES = {"cuda": 2 << 30, "cpu": 1 << 28}  # loss.CHUNK_BYTES
TILE_ROWS = 8192  # of one recomputed tile: enough to fill a GPU, 0.9 GB of an 8B draft's MLP
TILES = 8  # of more rows than that many tiles: fewer sums of weight gradients, and no more memory than the rows' own gradients
PREFETCHED = 1  # sequences that the feed holds on the device ahead of the one that trains

Parts = dict[str, int]
"""Bytes by what they are for."""


@dataclass(frozen=True)
class Rows:
    """Rows and attended keys of the busiest rank in one sequence."""

    context: int
    query: int
    aux: int
    target: int
    total: int
    attended_keys: int  # query-key pairs of one TTT step, over the heads that one rank holds of its ring rank's rows

    @classmethod
    def of(cls, sharding: SequenceSharding) -> Rows:
        """The busiest rank of ``plan`` in each respect."""
        ranks = range(sharding.world)
        return cls(
            context=max(rg.count(r) for r in sharding.context),
            query=max(rg.count(r) for r in sharding.queries),
            aux=max(rg.count(sharding.aux_rows(r)) for r in ranks),
            target=max(rg.count(sharding.target_rows(r)) for r in ranks),
            total=sharding.num_tokens,
            attended_keys=max(sharding.attention_work(r) for r in range(sharding.ring)),
        )

    @classmethod
    def of_rank(cls, sharding: SequenceSharding, rank: int) -> Rows:
        """One rank of ``plan``; ``rank`` counts within its sequence."""
        return cls(
            context=rg.count(sharding.context[rank]),
            query=rg.count(sharding.queries[rank]),
            aux=rg.count(sharding.aux_rows(rank)),
            target=rg.count(sharding.target_rows(rank)),
            total=sharding.num_tokens,
            attended_keys=sharding.attention_work(rank // sharding.ulysses),
        )


def predict_memory(
    recipe: Recipe, ds_json: Mapping[str, Any], world_size: int, sharding: SequenceSharding, *, cpu: bool = False, prefetched: int = PREFETCHED
) -> Parts:
    """Peak bytes of the busiest rank by component, at the stage of the step that holds most."""
    return max(stages(recipe, ds_json, world_size, sharding, cpu=cpu, prefetched=prefetched).values(), key=lambda parts: sum(parts.values()))


def stages(
    recipe: Recipe, ds_json: Mapping[str, Any], world_size: int, sharding: SequenceSharding, *, cpu: bool = False, prefetched: int = PREFETCHED
) -> dict[str, Parts]:
    """Bytes of the busiest rank by stage of the step and by component."""
    rows, element = Rows.of(sharding), 2 if bf16_enabled(dict(ds_json)) else 4
    inputs = (len(recipe.target.aux_ids) * rows.aux + rows.target) * recipe.target.hidden_size * element
    always = {
        "process": GIB * 9 // 10 if cpu else GIB * 3 // 2,  # Python, PyTorch, DeepSpeed, allocator; CUDA context, NCCL
        **model_bytes(recipe, ds_json, world_size, element),
        "hidden states": inputs,
        "next sequence's hidden states": prefetched * inputs,
    }
    unrolled = _Unrolled(recipe, sharding, rows, element, cpu)
    return {stage.name: always | unrolled.parts(stage) for stage in unrolled.stages()}


def host_bytes(recipe: Recipe, ds_json: Mapping[str, Any], sharding: SequenceSharding) -> int:
    """Pinned host memory that ``training.offload_activations`` fills on the busiest rank."""
    if not recipe.training.offload_activations:
        return 0
    rows, element = Rows.of(sharding), 2 if bf16_enabled(dict(ds_json)) else 4
    return _Unrolled(recipe, sharding, rows, element, cpu=False).moved_bytes


def draft_parameters(recipe: Recipe) -> dict[str, int]:
    """Trained parameters by part (biases and norms of the projections left out: thousands among hundreds of millions)."""
    draft, hidden = recipe.draft, recipe.draft.hidden_size
    queries, keys = draft.num_attention_heads * draft.head_dim, draft.num_key_value_heads * draft.head_dim
    return {
        "fc": len(recipe.target.aux_ids) * recipe.target.hidden_size * hidden,
        "attention": 2 * hidden * (queries + 2 * keys) + queries * hidden,
        "mlp": 3 * hidden * draft.intermediate_size,
        "lm_head": draft.vocab_size * hidden,
        "embed_tokens": recipe.target.vocab_size * hidden if hidden != recipe.target.hidden_size else 0,
    }


def model_bytes(recipe: Recipe, ds_json: Mapping[str, Any], world_size: int, element: int) -> Parts:
    """Weights, gradients and optimizer state, as DeepSpeed's ZeRO stage spreads them over all ranks.

    Its bf16 optimizer of ZeRO-1 keeps float32 gradients whole on every rank, beside those that autograd makes in a
    backward; those outlive their micro-batch only where several are accumulated.
    """
    count, stage = sum(draft_parameters(recipe).values()), zero_stage(dict(ds_json))
    shards = {name: world_size if stage >= least else 1 for name, least in (("state", 1), ("gradient", 2), ("weight", 3))}
    frozen = recipe.draft.vocab_size * recipe.target.hidden_size  # the target's head, its draft rows
    if recipe.draft.hidden_size == recipe.target.hidden_size:
        frozen += recipe.target.vocab_size * recipe.draft.hidden_size
    master = 0 if element == 4 and stage == 0 else 4
    accumulated = 4 if element == 2 and stage else 0  # data_types.grad_accum_dtype fp32
    earlier = count * element if recipe.training.gradient_accumulation > 1 else 0
    return {
        "weights": count * element // shards["weight"],
        "target's embedding and head": frozen * element,
        "gradients accumulated": count * accumulated // shards["gradient"] + earlier,
        "optimizer state": 0 if offloads_optimizer(dict(ds_json)) else count * (8 + master) // shards["state"],
    }


def tile_rows(rows: int) -> int:
    """Rows of each of the fewest tiles of at most ``TILE_ROWS``, but no more than ``TILES``, as equal as can be: what is recomputed is
    so a tile at a time."""
    return -(-rows // min(max(-(-rows // TILE_ROWS), 1), TILES)) or 1


def kv_slots(draft: DraftConfig, ulysses: int) -> int:
    """KV heads that each Ulysses rank holds; those that U does not divide are replicated."""
    per_rank, per_kv = draft.num_attention_heads // ulysses, draft.num_attention_heads // draft.num_key_value_heads
    return per_rank // math.gcd(per_rank, per_kv)


def prefix_bytes(recipe: Recipe, rows: int, element: int, gradient: int = 4) -> int:
    """K_0 and V_0 of one rank's head slots for ``rows`` rows, ``element`` bytes a number, with their gradients, ``gradient`` bytes."""
    width = kv_slots(recipe.draft, recipe.parallel.ulysses) * recipe.draft.head_dim
    return 2 * rows * width * (element + gradient)


def _rotates(sharding: SequenceSharding) -> bool:
    return sharding.ring > 1 and sharding.ring_mode == "p2p"


def _prefix_rows(sharding: SequenceSharding) -> int:
    return -(-sharding.num_tokens // sharding.ring) if _rotates(sharding) else sharding.num_tokens


def kept_per_query_row(recipe: Recipe, element: int, ulysses: int, *, eager: bool = False) -> Parts:
    """Bytes that autograd keeps of one query row and TTT step; ``diagonals`` from step 1 on. ``eager``: elementwise work is
    not fused (CPU)."""
    draft, recompute = recipe.draft, recipe.training.recompute
    hidden, inner = draft.hidden_size, draft.intermediate_size
    queries, keys = draft.num_attention_heads * draft.head_dim, draft.num_key_value_heads * draft.head_dim
    copies = 3 if ulysses > 1 and recompute != "full" else 2  # q, out, and unless it is sent again q with its heads sharded
    kept = {
        "states": hidden * element,
        "attention": copies * queries * element + 4 * draft.num_attention_heads,
        "diagonals": 2 * keys * element,
        "mlp": 0,
    }
    if recompute == "selective":  # the output projection, gate and up
        kept["mlp"] = (hidden + 2 * inner) * element
    if recompute == "none":
        kept["mlp"] = ((4 if eager else 2) * hidden + (4 if eager else 3) * inner) * element
    return kept


@dataclass(frozen=True)
class _Stage:
    """A moment of the step: of how many TTT steps each kind of tensor is on the device, and what the work itself takes."""

    name: str
    states: int
    attention: int
    diagonals: int
    mlp: int
    gradients: int  # of states, which the loss makes for all steps at once
    workspace: int  # bytes
    summed: bool = True  # dK_0 and dV_0 are there: from the first backward of attention on
    projected: bool = False  # the gradients of what tokens are projected to: from the first backward of projections on
    ahead: int = 0  # bytes of a query row that are on their way from host memory


class _Unrolled:
    """The T steps of the busiest rank, in bytes. ``state``, ``query``, ``diagonal``, ``inner``: one row's vector of each kind."""

    def __init__(self, recipe: Recipe, sharding: SequenceSharding, rows: Rows, element: int, cpu: bool) -> None:
        draft = recipe.draft
        self.recipe, self.sharding, self.rows, self.element, self.cpu = recipe, sharding, rows, element, cpu
        self.steps, self.recompute = recipe.training.ttt_steps, recipe.training.recompute
        self.offloads = recipe.training.offload_activations
        self.kept = kept_per_query_row(recipe, element, sharding.ulysses, eager=cpu)
        self.state = draft.hidden_size * element
        self.query = draft.num_attention_heads * draft.head_dim * element
        self.diagonal = 2 * draft.num_key_value_heads * draft.head_dim * element  # K and V
        self.inner = draft.intermediate_size * element
        self.prefix = _prefix_rows(sharding)
        self.dkv = prefix_bytes(recipe, self.prefix, 0)
        self.tokens = rows.target + 1
        self.embedding = self.state if draft.hidden_size != recipe.target.hidden_size else 0  # one that is trained is kept
        self.weights = (self.query + self.diagonal) * 2 * draft.hidden_size  # of q, k and v, lent for the micro-batch

    def stages(self) -> list[_Stage]:
        """What may be the peak, in the order of a step."""
        after = [("exchange of dK_0/dV_0", self._exchange()), ("backward of the context rows", self._context())]
        last_step = self._offloaded() if self.offloads else self._all_on_the_device()
        begin = _Stage("backward of the tokens", 0, 0, 0, 0, 0, self.rows.query * self.state + self._begin(), projected=True)
        return [*last_step, begin] + [_Stage(name, 0, 0, 0, 0, 0, self.rows.aux * self.state + size) for name, size in after]

    def _all_on_the_device(self) -> list[_Stage]:
        """The loss reads all states, g_T too; the backward begins while every step's tensors are there. The last MLP but one finds
        one step's less, but dK_0/dV_0, and the gradients of all that the last step read."""
        t, early = self.steps, max(self.steps - 2, 0)
        dkv = self.rows.query * early * self.diagonal  # gradients of earlier steps' diagonals, which gather until their own turn
        return [
            _Stage("loss", t, t, t - 1, t, t, self._loss(), summed=False),
            _Stage("backward of the MLP", t - 1, t, t - 1, t, t, self._mlp(), summed=False),
            _Stage("backward of attention", t - 1, t, t - 1, t - 1, t - 1, self._attention()),
            _Stage("backward of the projections", t - 1, t - 1, early, t - 1, t - 1, dkv + self._projections(), projected=True),
            _Stage("backward of the MLP but one", t - 2, t - 1, early, t - 1, t - 1, dkv + self._mlp(), projected=True),
            _Stage("backward of attention but one", t - 2, t - 1, early, t - 2, early, dkv + self._attention(), projected=True),
        ][: 4 if t == 1 else None]

    def _offloaded(self) -> list[_Stage]:
        """The forward holds one step, and the states for the loss; the backward holds one step, and what was fetched ahead.
        Diagonals stay on the device. The last step but one finds more of their gradients there."""
        t, early, row = self.steps, max(self.steps - 2, 0), self.rows.query
        dkv, tiled = row * early * self.diagonal, self.recompute != "none"  # attention's part comes after an MLP's that is kept
        queries = (self.kept["attention"] - self.query) * tiled
        before = self.state + self.query if tiled else 2 * self.inner  # what an earlier step is begun with
        late = before if self.recompute == "full" else 0
        inside = 0 if tiled else self.inner + self.state
        leaving = self.rows.aux * self.state + row * (2 * self._largest_kept() + inside)  # fused states; two copies under way
        return [
            _Stage("forward of the context rows", 0, 0, 0, 0, 0, self._context_forward(), summed=False),
            _Stage("forward", t - 1, 1, t - 1, 0, 0, leaving + self.tokens * (self.query + self.diagonal), summed=False),
            _Stage("loss", t, 0, t - 1, 0, t, self._loss(), summed=False),
            _Stage("backward of the last MLP", 1, int(tiled), t - 1, 1, t, self._mlp(), summed=False, ahead=queries),
            _Stage("backward of the last MLP but one", 1, int(tiled), early, 1, t - 1, dkv + self._mlp(), projected=True, ahead=queries),
            _Stage("backward of the last attention", 1, 1, t - 1, 0, t - 1, self._attention(), ahead=late),
            _Stage("backward of the last attention but one", 1, 1, early, 0, early, dkv + self._attention(), projected=True, ahead=late),
            _Stage("backward of the last projections", 1, 0, early, 0, t - 1, dkv + self._projections(), projected=True, ahead=before),
        ]

    def parts(self, stage: _Stage) -> Parts:
        """What is held at ``stage``, without what is held always."""
        rows, after = self.rows.query, not stage.states and stage.summed
        of_context = stage.name.endswith("of the context rows")  # K_0 and V_0 are to come, or gone home
        kept = {name: getattr(stage, name) * size for name, size in self.kept.items()}
        away = self.offloads and not after
        return {
            "K_0/V_0": 0 if of_context else prefix_bytes(self.recipe, self.prefix, self.element, 0),
            "dK_0/dV_0": self.dkv if stage.summed and not of_context else 0,
            "context rows": 0 if away else self._context_rows(),
            "query rows: projections of tokens": self._projected() if stage.projected else 0,
            "weights lent": self.weights,
            "query rows: first states": 0 if away or after else self._first_states(),
            **{f"query rows: {name}": rows * size for name, size in kept.items()},
            "query rows: fetched ahead": rows * stage.ahead,
            "query rows: gradients of states": rows * stage.gradients * self.state,
            "gradients made by autograd": self._weight_gradients(stage) * self.element,
            f"workspace: {stage.name}": stage.workspace,
        }

    def _weight_gradients(self, stage: _Stage) -> int:
        """Numbers in the gradients that autograd sums up over tiles and steps: not those of fc and of q, k and v, which come last,
        nor those of embeddings before the tokens' own; and the largest of those under way, beside its sum."""
        parts, draft = draft_parameters(self.recipe), self.recipe.draft
        projections = parts["attention"] - draft.num_attention_heads * draft.head_dim * draft.hidden_size
        made = sum(parts.values()) - parts["fc"] - parts["embed_tokens"]
        if stage.name.startswith(("exchange", "backward of the context rows")):
            made += parts["embed_tokens"]
        if stage.name.startswith(("forward", "loss")):
            return 0
        return made - projections + (parts["mlp"] // 3 if "MLP" in stage.name else 0)

    @property
    def moved_bytes(self) -> int:
        """All that autograd keeps of context and query rows, but for the diagonals."""
        last = {"states": self.steps - 1, "diagonals": 0}
        of_steps = sum(last.get(name, self.steps) * size for name, size in self.kept.items())
        return self._context_rows() + self._first_states() + self.rows.query * of_steps

    def _context_rows(self) -> int:
        """Fused states, and what their projections keep: nothing; K_0 and V_0; or z, and the embedding that is trained. Trained
        embeddings of the steps' tokens too."""
        angles = 2 * 2 * self.recipe.draft.head_dim  # cos and sin in float32
        z = {"full": 0, "selective": self.diagonal}.get(self.recompute, (4 if self.cpu else 2) * self.state + angles)
        embedded = self.embedding if self.recompute in ("none", "mlp") else 0
        return self.rows.context * (self.state + z + embedded) + self.tokens * self.embedding

    def _largest_kept(self) -> int:
        """The largest single tensor that a query row leaves: a state, q, or the inside of the MLP."""
        return max(self.state, self.query, self.inner if self.kept["mlp"] else 0)

    def _projected(self) -> int:
        """Gradients of what tokens are projected to, and of W_g, as the steps add them up."""
        columns, wide = (self.query + self.diagonal) // self.element, max(self.element, 4)
        return columns * wide * (self.tokens + self.recipe.draft.hidden_size)

    def _first_states(self) -> int:
        """g_0: a copy of fused rows, unless every row that the rank reads is a query row and a context row."""
        shared = self.rows.query == self.rows.context == self.rows.aux
        return 0 if shared else self.rows.query * self.state

    def _loss(self) -> int:
        """One chunk of rows: wide logits of the labels and of all steps, and the latter's gradients; the head's wide gradient."""
        vocab, steps, wide = self.recipe.draft.vocab_size, self.steps, max(self.element, 4)
        budget = LOSS_CHUNK_BYTES["cpu" if self.cpu else "cuda"]
        chunk = max(budget // (vocab * (steps * (self.element + wide) + 3 * wide)), 16)
        chunk = min(self.rows.query, chunk // 256 * 256 or chunk)
        d_logits, labels, states = chunk * vocab * steps * self.element, chunk * vocab * wide, chunk * steps * self.state
        matrix = vocab * self.recipe.draft.hidden_size
        forward = d_logits + labels + (6 if self.cpu else 1) * chunk * vocab * steps * wide + 2 * states
        backward = d_logits + labels + 4 * states + matrix * self.element
        return matrix * wide + max(forward, backward)

    def _mlp(self) -> int:
        """Inputs' gradients of all rows, and the MLP's inside: of a tile where it is recomputed, else beside what is kept. The
        gradients of gate and up are written over them."""
        rows, tile = self.rows.query, tile_rows(self.rows.query)
        if self.recompute == "none":
            return rows * (self.inner + self.state)
        inside = 2 if self.recompute == "selective" else 4  # the product and its gradient; gate and up, where they are not kept
        in_tiles = (rows - tile) * (self.state + self.query) + tile * (inside * self.inner + 3 * self.state)
        return max(in_tiles, rows * (2 * self.state + 2 * self.query))  # at the end the tiles' gradients beside the whole

    def _attention(self) -> int:
        """The largest of: the kernel with its float32 dq; the way back through Ulysses; the diagonals' pass."""
        rows, wide = self.rows.query, self.query // self.element * 4
        copies = (3 if self.recompute == "full" else 2) * self.query if self.sharding.ulysses > 1 else 0  # dout, out, q with heads sharded
        if _rotates(self.sharding):  # dq in float32 over all blocks; a block's K/V and dK/dV here, arriving and leaving
            kernel = rows * (2 * self.query + copies + 2 * wide) + self.dkv // 4 * self.element * 2 + 3 * self.dkv
        else:
            kernel = rows * (2 * self.query + copies + wide) + self.dkv // 4 * self.element
        home = rows * (2 + 2 * (copies > 0)) * self.query + rows * copies
        return max(kernel, home, rows * (3 * self.query + (self.steps - 1) * self.diagonal))

    def _projections(self) -> int:
        """dq, dK_k and dV_k, the gradient of the state that they become, and what is between, a tile at a time."""
        rows, projected = self.rows.query, self.query + self.diagonal
        return rows * (projected + self.state) + tile_rows(rows) * (projected + 3 * self.state)

    def _begin(self) -> int:
        """The gradient of W_e, that of both halves, and a tile of tokens."""
        weights = self.weights // self.element
        return weights // 2 * 4 + weights * (4 + self.element) + tile_rows(self.tokens) * (self.query + self.diagonal + 2 * self.state)

    def _through_z(self, rows: int) -> int:
        """z and one or two of its gradients beside K and V; in tiles where z is computed again."""
        inside = max(2 * self.state + self.diagonal, 3 * self.state)
        if self.recompute in ("none", "mlp"):
            return rows * inside
        return rows * (self.state + self.diagonal // 2) + tile_rows(rows) * (3 * self.state + inside)

    def _context_forward(self) -> int:
        """Fused states, and of a tile or of all rows embedding, both norms and z."""
        rows = self.rows.context if self.recompute in ("none", "mlp") else tile_rows(self.rows.context)
        return self.rows.aux * self.state + rows * 5 * self.state

    def _exchange(self) -> int:
        """dK_0/dV_0 of the rank's own rows; on the way there a received and a summed copy of what the rank held. Beside them the
        gradient of the weights lent, as far as the steps have made it."""
        return self.weights + self.rows.context * self.diagonal + (2 * self.dkv if self.sharding.world > 1 else 0)

    def _context(self) -> int:
        """dK_0/dV_0 on their way through z, beside the gradient of the weights lent."""
        return self.weights + self.rows.context * self.diagonal + self._through_z(self.rows.context)
