"""Predict the device memory of a training step: what the busiest rank holds at each stage, tensor by tensor.

``MemoryModel`` lists the stages of one step at which memory can peak; the prediction is the stage that holds
most. In order:

    forward     the context rows (K_0/V_0), the T TTT steps, the loss of all steps together
    backward    each TTT step, the last one first: its MLP, its attention, its projections
                then the token projections, the exchange of dK_0/dV_0, and the context rows

The usual peak is the backward of the last TTT step: when it starts, everything that the forward saved is
still allocated. If few rows are trained, one of the stages at the end can be larger.

Letters such as ``S``, ``D``, ``Hq`` are explained in ``eagle_ds/__init__.py``; ``I`` is the MLP's inner width
and ``e`` the bytes of one activation (2 in bfloat16, 4 in float32). Shapes in comments are per rank.

The predictions are compared with ``torch.cuda.max_memory_allocated`` on H200s, and with the allocations of a
real step on a CPU, in ``tests/estimate/test_memory.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from eagle_ds.config.deepspeed import element_bytes, offloads_optimizer, zero_stage
from eagle_ds.config.recipe import Recipe
from eagle_ds.estimate.devices import GIB
from eagle_ds.estimate.tensor_sizes import NOTHING, Saved, TensorSizes
from eagle_ds.sharding.sequence import SequenceSharding

PREFETCHED = 1  # sequences whose hidden states are already on the device while another one trains

Parts = dict[str, int]
"""Bytes by what they are used for."""


class Phase(Enum):
    """What the rank computes at a stage: its name in ``--plan``, and the size of its workspace."""

    CONTEXT_FORWARD = "forward of the context rows", TensorSizes.context_forward
    FORWARD = "forward of the TTT steps", TensorSizes.offloaded_forward
    LOSS = "loss", TensorSizes.loss
    MLP = "backward of the MLP", TensorSizes.mlp
    ATTENTION = "backward of attention", TensorSizes.attention
    PROJECTIONS = "backward of the projections", TensorSizes.projections
    TOKENS = "backward of the token projections", TensorSizes.token_projections
    EXCHANGE = "exchange of dK_0/dV_0", TensorSizes.exchange
    CONTEXT_BACKWARD = "backward of the context rows", TensorSizes.context_backward

    def __init__(self, label: str, workspace: Callable[[TensorSizes], int]) -> None:
        self.label, self.workspace = label, workspace

    @property
    def is_forward(self) -> bool:
        """Whether the backward pass has not started: autograd has made no weight gradient yet."""
        return self in (Phase.CONTEXT_FORWARD, Phase.FORWARD, Phase.LOSS)

    @property
    def is_context(self) -> bool:
        """Whether context rows are computed: before K_0/V_0 are exchanged, or after dK_0/dV_0 have been."""
        return self in (Phase.CONTEXT_FORWARD, Phase.CONTEXT_BACKWARD)


@dataclass(frozen=True)
class Stage:
    """A moment of the step at which memory can peak."""

    phase: Phase
    saved: Saved = NOTHING  # for each kind of saved tensor: TTT steps whose tensors are on the device
    state_gradients: int = 0  # number of states g_k whose gradient is on the device
    earlier_step: bool = False  # in the backward of the second-to-last TTT step, not of the last one
    fetched: int = 0  # bytes per query row that are being fetched from host memory

    @property
    def name(self) -> str:
        """Name for the text of ``--plan``."""
        return self.phase.label + (", second-to-last TTT step" if self.earlier_step else "")

    @property
    def has_dkv(self) -> bool:
        """Whether dK_0/dV_0 are allocated: from the first backward of attention on."""
        return self.earlier_step or not (self.phase.is_forward or self.phase is Phase.MLP)

    @property
    def has_token_gradients(self) -> bool:
        """Whether the projected tokens' gradients are allocated: from the first projections' backward on."""
        return self.earlier_step or self.phase in (Phase.PROJECTIONS, Phase.TOKENS)

    @property
    def steps_are_done(self) -> bool:
        """Whether the backward has released every state of the TTT steps."""
        return not self.saved.states and self.has_dkv


class MemoryModel:
    """The memory that training on one sequence needs on the busiest rank.

    Args:
        ds_json: the DeepSpeed JSON; it decides the element size and where the optimizer's state is kept.
        cpu: predict for a CPU, where elementwise operations are not fused.
        prefetched: sequences whose hidden states are read ahead of the one that trains.
    """

    def __init__(
        self, recipe: Recipe, ds_json: dict[str, Any], world_size: int, sharding: SequenceSharding,
        *, cpu: bool = False, prefetched: int = PREFETCHED,
    ) -> None:
        self.recipe = recipe
        self.cpu, self.prefetched = cpu, prefetched
        self.ds_json, self.world_size = ds_json, world_size
        self.offloads = recipe.training.offload_activations
        self.sizes = TensorSizes(recipe, sharding, element_bytes(ds_json), cpu=cpu)

    def peak(self) -> Parts:
        """Return the bytes by component at the stage that holds most."""
        return max(self.by_stage().values(), key=lambda parts: sum(parts.values()))

    @property
    def peak_bytes(self) -> int:
        """Bytes at the stage that holds most."""
        return sum(self.peak().values())

    @property
    def host_bytes(self) -> int:
        """Bytes of pinned host memory that ``training.offload_activations`` fills.

        Everything that is kept for the backward is moved there, except the diagonals.
        """
        if not self.offloads:
            return 0
        sizes = self.sizes
        kept, steps = sizes.kept, sizes.steps
        # g_0 is counted by first_states, so T - 1 states follow it.
        of_steps = (steps - 1) * kept.states + steps * (kept.attention + kept.mlp)
        return sizes.context_rows() + sizes.first_states() + sizes.rows.query * of_steps

    def by_stage(self) -> dict[Stage, Parts]:
        """Return the bytes by component at every stage, in the order of a step."""
        inputs = self.sizes.inputs()
        always = {
            # Python, PyTorch, DeepSpeed and the allocator; on a GPU also the CUDA context and NCCL.
            "process": GIB * 9 // 10 if self.cpu else GIB * 3 // 2,
            **self._model(),
            "hidden states": inputs,
            "next sequence's hidden states": self.prefetched * inputs,
        }
        return {stage: always | self._parts(stage) for stage in self.stages()}

    def stages(self) -> list[Stage]:
        """List the stages that can be the peak, in the order of a step."""
        last_steps = self._stages_offloaded() if self.offloads else self._stages_on_device()
        return [*last_steps, Stage(Phase.TOKENS), Stage(Phase.EXCHANGE), Stage(Phase.CONTEXT_BACKWARD)]

    def _stages_on_device(self) -> list[Stage]:
        """List the loss and the backward of the last two TTT steps. All saved tensors stay on the device.

        The loss reads g_1 to g_T and makes all their gradients. The backward starts with every step's tensors
        present. The backward of the second-to-last step holds the tensors of one step fewer, but also
        dK_0/dV_0 and the gradients of the projected tokens.
        """
        t, early = self.sizes.steps, max(self.sizes.steps - 2, 0)
        stages = [
            Stage(Phase.LOSS, Saved(t, t, t - 1, t), t),
            Stage(Phase.MLP, Saved(t - 1, t, t - 1, t), t),
            Stage(Phase.ATTENTION, Saved(t - 1, t, t - 1, t - 1), t - 1),
            Stage(Phase.PROJECTIONS, Saved(t - 1, t - 1, early, t - 1), t - 1),
            Stage(Phase.MLP, Saved(t - 2, t - 1, early, t - 1), t - 1, earlier_step=True),
            Stage(Phase.ATTENTION, Saved(t - 2, t - 1, early, t - 2), early, earlier_step=True),
        ]
        return stages[:4] if t == 1 else stages

    def _stages_offloaded(self) -> list[Stage]:
        """List the forward, the loss and the backward of the last two TTT steps, with offloaded activations.

        The forward holds the tensors of one step, and the states that the loss will read. The backward holds
        those of one step, and the tensors that the next operation reads, which are fetched early. Diagonals
        and their gradients stay on the device.
        """
        sizes, t = self.sizes, self.sizes.steps
        early = max(t - 2, 0)
        # The next operation's tensors are fetched while the current operation runs. A recomputed MLP reads
        # attention's output and log-sum-exp; if the MLP was kept, they are fetched after its backward.
        tiled = int(sizes.recompute != "none")
        for_mlp = (sizes.kept.attention - sizes.query) * tiled
        for_step = sizes.state + sizes.query if tiled else 2 * sizes.inner
        for_attention = for_step if sizes.recompute == "full" else 0
        return [
            Stage(Phase.CONTEXT_FORWARD),
            Stage(Phase.FORWARD, Saved(t - 1, 1, t - 1)),
            Stage(Phase.LOSS, Saved(t, 0, t - 1), t),
            Stage(Phase.MLP, Saved(1, tiled, t - 1, 1), t, fetched=for_mlp),
            Stage(Phase.MLP, Saved(1, tiled, early, 1), t - 1, earlier_step=True, fetched=for_mlp),
            Stage(Phase.ATTENTION, Saved(1, 1, t - 1), t - 1, fetched=for_attention),
            Stage(Phase.ATTENTION, Saved(1, 1, early), early, earlier_step=True, fetched=for_attention),
            Stage(Phase.PROJECTIONS, Saved(1, 0, early), t - 1, fetched=for_step),
        ]

    def _workspace(self, stage: Stage) -> int:
        """Return the bytes that the computation itself needs."""
        # Every TTT step adds to dK_j/dV_j of the earlier diagonals. They stay allocated until the backward
        # of TTT step j.
        has_waiting = stage.earlier_step or stage.phase is Phase.PROJECTIONS
        waiting = self.sizes.rows.query * max(self.sizes.steps - 2, 0) * self.sizes.diagonal
        return stage.phase.workspace(self.sizes) + has_waiting * waiting

    def _parts(self, stage: Stage) -> Parts:
        """Return the bytes of activations and gradients at ``stage``."""
        sizes, rows = self.sizes, self.sizes.rows.query
        offloaded = self.offloads and not stage.steps_are_done
        kinds = zip(Saved._fields, stage.saved, sizes.kept, strict=True)
        held = {f"query rows: {kind}": rows * steps * row_bytes for kind, steps, row_bytes in kinds}
        return {
            "K_0/V_0": 0 if stage.phase.is_context else sizes.prefix,
            "dK_0/dV_0": sizes.dkv if stage.has_dkv and not stage.phase.is_context else 0,
            "context rows": 0 if offloaded else sizes.context_rows(),
            "query rows: gradients of projected tokens": stage.has_token_gradients * sizes.token_gradients(),
            "copy of the q, k, v weights": sizes.qkv_weights,
            "query rows: g_0": 0 if offloaded or stage.steps_are_done else sizes.first_states(),
            **held,
            "query rows: being fetched": rows * stage.fetched,
            "query rows: gradients of states": rows * stage.state_gradients * sizes.state,
            "gradients made by autograd": self._weight_gradients(stage.phase) * sizes.element,
            f"workspace: {stage.name}": self._workspace(stage),
        }

    def _model(self) -> Parts:
        """Return the bytes of weights, gradients and optimizer state on one rank, by DeepSpeed's ZeRO stage.

        The bf16 optimizer of ZeRO-1 keeps a whole float32 copy of the gradients on every rank, in addition to
        those that autograd makes in a backward. Autograd's outlive their micro-batch only with gradient
        accumulation.
        """
        recipe, sizes = self.recipe, self.sizes
        element = sizes.element
        count, stage = sum(sizes.parameters.values()), zero_stage(self.ds_json)
        # ZeRO stage 1 spreads the optimizer's state, stage 2 gradients too, stage 3 weights too.
        state_ranks, gradient_ranks, weight_ranks = (self.world_size if stage >= s else 1 for s in (1, 2, 3))
        frozen = recipe.draft.vocab_size * recipe.target.hidden_size  # rows of the target's head
        if not sizes.embedding:  # the target's embedding, which the draft shares
            frozen += recipe.target.vocab_size * recipe.draft.hidden_size
        master = 0 if element == 4 and stage == 0 else 4  # float32 master weights
        accumulated = 4 if element == 2 and stage else 0  # data_types.grad_accum_dtype fp32
        earlier = count * element if recipe.training.gradient_accumulation > 1 else 0
        adam = 0 if offloads_optimizer(self.ds_json) else count * (8 + master)  # two float32 moments
        return {
            "weights": count * element // weight_ranks,
            "target's embedding and head": frozen * element,
            "gradients accumulated": count * accumulated // gradient_ranks + earlier,
            "optimizer state": adam // state_ranks,
        }

    def _weight_gradients(self, phase: Phase) -> int:
        """Count the elements of the weight gradients that autograd has allocated at this stage.

        Those of fc, q, k and v are left out, because they are made last. The embedding's counts from the
        exchange of dK_0/dV_0 on.
        """
        if phase.is_forward:
            return 0
        parts, draft = self.sizes.parameters, self.recipe.draft
        qkv = parts["attention"] - draft.num_attention_heads * draft.head_dim * draft.hidden_size
        made = sum(parts.values()) - parts["fc"] - parts["embed_tokens"] - qkv
        if phase in (Phase.EXCHANGE, Phase.CONTEXT_BACKWARD):
            made += parts["embed_tokens"]
        # While the MLP's backward runs, one new gradient (gate, up or down) exists next to its running sum.
        return made + (parts["mlp"] // 3 if phase is Phase.MLP else 0)

