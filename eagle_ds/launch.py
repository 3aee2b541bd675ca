"""What every ``recipes/NAME.sh`` calls: show help or the plan, start the launcher, or train.

A recipe file is valid bash and valid Python. ``deepspeed --num_gpus 8 recipes/NAME.sh`` runs it as Python
with RANK set, once per GPU: then it trains. ``bash recipes/NAME.sh`` runs its bash header, which starts it as
Python without RANK: then this module starts the DeepSpeed launcher with as many processes as fit.

torch and DeepSpeed take seconds to import, so they are imported only to train. ``--help``, ``--plan`` and
every error in a recipe appear at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle_ds.config.recipe import Recipe, load_own_recipe
from eagle_ds.config.run_folder import lock_run
from eagle_ds.config.settings import choices_of, dotted_fields, join_or, section_of
from eagle_ds.training.preflight import check_files, check_layout

if TYPE_CHECKING:
    from eagle_ds.training.world import World

logger = logging.getLogger(__name__)

FAILED, USAGE_ERROR = 1, 2
DEEPSPEED_PORT = 29500

USAGE = """\
Train:       deepspeed --num_gpus {world} {script}
             bash {script}                      (starts the launcher with as many processes as fit)
Look first:  {script} --plan         (resolved recipe, sharding, memory, time, files; starts nothing)
Change:      {script} --training.max_steps 10 --training.learning_rate 5e-5
Resume:      the same command again  (from the newest checkpoint in the run folder)
Stop:        kill PID of any rank     (all ranks save a checkpoint at the next step and end)

options:
  --help            show this text
  --plan            print what a run would do, and start nothing
  --num_gpus N      with bash: start N processes; with --plan: plan for N
                    (default: all GPUs that form whole groups of ulysses * ring)
  --gpu NAME        with --plan: plan for h200, h100, a100, b200, cpu, or a memory size such as 48GiB
                    (default: the GPU here, else h200)
  --fresh           rename an existing run folder and start from step 0; nothing is deleted
  --local_rank I    set by the DeepSpeed launcher
  --SECTION.NAME V  override any setting below; V is JSON or text; relative paths start at the repository

settings (with this recipe's values):
"""


@dataclass(frozen=True)
class Invocation:
    """How a recipe was called."""

    script: Path
    options: argparse.Namespace
    overrides: tuple[str, ...]  # --SECTION.NAME V, as typed
    accelerator: str | None  # DS_ACCELERATOR: "cpu", or None for GPUs

    @property
    def recipe_json(self) -> Path:
        """Path of the recipe's JSON, relative to the repository if it is inside."""
        path = self.script.with_suffix(".json")
        return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main(script: str, accelerator: str | None = None) -> None:
    """Run the recipe ``script`` with the command line of this process.

    Args:
        script: path of the recipe's ``.sh`` file.
        accelerator: value of DS_ACCELERATOR if the environment does not set it; "cpu" for recipes meant for
            CPUs.
    """
    path = Path(script).resolve()
    os.chdir(Path(__file__).resolve().parent.parent)
    options, overrides = _parse(sys.argv[1:])
    if accelerator:
        os.environ.setdefault("DS_ACCELERATOR", accelerator)
    call = Invocation(path, options, tuple(overrides), os.environ.get("DS_ACCELERATOR"))
    rank = int(os.environ.get("RANK", -1))  # -1: not started by the launcher
    level = logging.INFO if rank <= 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    try:
        if (wanted := options.num_gpus) is not None and wanted < 1:
            raise ValueError(f"--num_gpus {wanted} is out of range; give 1 or more, or leave it out")
        recipe = load_own_recipe(call.recipe_json, overrides)
        if options.help or options.plan:
            if rank <= 0:
                sys.stdout.write(help_text(call, recipe) if options.help else _plan_text(call, recipe))
            return
        # Every rank checks again: on a cluster, its node may have other files than the one that started the
        # launcher.
        check_files(recipe, call.recipe_json, overrides)
        world_size = int(os.environ["WORLD_SIZE"]) if rank >= 0 else choose_world_size(recipe, call)
        check_layout(recipe, world_size)
        if options.fresh and rank <= 0:
            set_aside(recipe.run_dir)
    except ValueError as error:
        _complain_once(error, USAGE_ERROR)
    if rank < 0:
        _start_launcher(call, world_size)
    _train(recipe, rank)


def enter_repository(arguments: argparse.Namespace, models: Sequence[str] = ("target", "baseline")) -> None:
    """Change to the repository, where the relative paths of a recipe start.

    Paths on the command line are relative to where the user typed it, so they are made absolute first.

    Args:
        arguments: parsed options of a tool; its ``Path`` values are changed in place.
        models: options that name a folder or a Hugging Face model. They are changed only if such a folder
            exists.
    """
    root = Path(__file__).resolve().parent.parent
    if Path.cwd() == root:
        return
    for name, value in vars(arguments).items():
        if isinstance(value, Path) or (name in models and value and Path(value).exists()):
            setattr(arguments, name, type(value)(Path(value).absolute()))
    os.chdir(root)


def _complain_once(error: ValueError, code: int) -> None:
    """Print an error that all ranks have, once per node, and exit.

    The node's first rank exits with ``code``. The others exit with 0: if they failed too, the launcher could
    kill the first one before it has printed the message.
    """
    if int(os.environ.get("LOCAL_RANK", 0)):
        sys.exit(0)
    sys.stderr.write(f"error: {error}\n")
    sys.exit(code)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flags in (("--help", "-h"), ("--plan",), ("--fresh",)):
        parser.add_argument(*flags, action="store_true")
    parser.add_argument("--num_gpus", type=int)
    parser.add_argument("--gpu")
    parser.add_argument("--local_rank", "--local-rank", type=int)
    return parser.parse_known_args(argv)


def help_text(call: Invocation, recipe: Recipe) -> str:
    """Return the recipe's header comments, the ways to call it, and every setting with its value."""
    about = _header(call.script)
    script = call.script.relative_to(Path.cwd()) if call.script.is_relative_to(Path.cwd()) else call.script
    values = recipe.model_dump()
    rows = []
    for name, field in dotted_fields(Recipe):
        value = values
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        shown = value if isinstance(value, str) else json.dumps(value)
        choices = f" One of {join_or(choices_of(field))}." if choices_of(field) else ""
        is_section = section_of(field) and value is not None
        text = field.description if is_section else f"{shown}  {field.description}{choices}"
        rows.append(f"  --{name:<34} {text}")
    return f"{about}\n\n{USAGE.format(script=script, world=recipe.parallel.size)}" + "\n".join(rows) + "\n"


def _header(script: Path) -> str:
    """Return a recipe's header comments; those of a copy that still describe the original are marked as such.
    """
    comments = [line for line in script.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    # Without the first comment, the shebang, and the last one, the end of the bash part.
    lines = [line.removeprefix("#").removeprefix(" ") for line in comments[1:-1]]
    described = re.match(r"[\w.-]+(?=: )", lines[0]) if lines else None
    if described is None or described[0] == script.stem:
        return "\n".join(lines)
    note = (
        f"{script.stem}: {script.name} has no header of its own yet. The lines marked with | describe "
        f"{described[0]};\nits commands, reasons and measurements need not hold here. Rewrite them in "
        f"{script.name}, beginning with\n# {script.stem}: ...\n\n"
    )
    return note + "\n".join(f"| {line}".rstrip() for line in lines)


def _plan_text(call: Invocation, recipe: Recipe) -> str:
    from eagle_ds.estimate.plan_text import describe_plan

    world_size = int(os.environ.get("WORLD_SIZE", 0)) or call.options.num_gpus or recipe.parallel.size
    gpu = call.options.gpu or ("cpu" if call.accelerator == "cpu" else None)
    return describe_plan(recipe, call.recipe_json, world_size, gpu, call.overrides)


def choose_world_size(recipe: Recipe, call: Invocation) -> int:
    """Return the number of processes that ``bash NAME.sh`` starts.

    That is ``--num_gpus``, or else all visible GPUs that form whole sequence-parallel groups. On a CPU it is
    one group.

    Raises ValueError if there are not enough GPUs.
    """
    size, wanted = recipe.parallel.size, call.options.num_gpus
    if call.accelerator == "cpu":
        return wanted or size
    import torch

    visible = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    world_size = wanted or visible // size * size
    if not size <= world_size <= visible:
        layout = f"ulysses {recipe.parallel.ulysses} * ring {recipe.parallel.ring} = {size} GPUs"
        asked = f" and {wanted} were asked for" if wanted else ""
        remedy = "lower --parallel.ulysses or --parallel.ring"
        remedy += "" if visible else ", or set DS_ACCELERATOR=cpu to run on the CPU"
        raise ValueError(f"{recipe.name} needs {layout}{asked}, but {visible} can be seen; {remedy}")
    return world_size


def launcher_command(call: Invocation, world_size: int) -> list[str]:
    """Return the command that starts the DeepSpeed launcher on this machine."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    chosen = devices.split(",")[:world_size]
    if call.accelerator != "cpu" and len(chosen) == world_size and all(d.isdigit() for d in chosen):
        # With --num_gpus the launcher would ignore CUDA_VISIBLE_DEVICES and take the first GPUs.
        where = ["--include", f"localhost:{','.join(chosen)}"]
    else:
        where = ["--num_gpus", str(world_size)]
    arguments = ["--master_port", str(_free_port()), str(call.script), *call.overrides]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *where, *arguments]


def _start_launcher(call: Invocation, world_size: int) -> None:
    command = launcher_command(call, world_size)
    logger.info("starting %d processes: %s", world_size, " ".join(command))
    _prepare_environment(world_size, call.accelerator)
    os.execv(command[0], command)


def _train(recipe: Recipe, rank: int) -> None:
    local_processes = int(os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))
    _prepare_environment(local_processes, os.environ.get("DS_ACCELERATOR"))
    from eagle_ds.reporting.report import write_report
    from eagle_ds.training.agreement import RankFailure
    from eagle_ds.training.sizing import OutOfMemory
    from eagle_ds.training.stopping import leave_at_once

    try:
        train_rank(recipe, int(os.environ.get("LOCAL_RANK", 0)))
        if rank == 0:
            write_report(recipe.run_dir)
    except RankFailure as error:  # the same on all ranks
        _complain_once(error, FAILED)
    except OutOfMemory as error:  # perhaps on this rank only, while the others wait for it
        leave_at_once(f"error (rank {rank}): {error}", FAILED)
    except (ValueError, OSError) as error:
        logger.debug("%s", traceback.format_exc())
        sys.stderr.write(f"error (rank {rank}): {error}\n")
        sys.exit(FAILED)


def train_rank(recipe: Recipe, local_rank: int, join: Callable[..., World] | None = None) -> None:
    """Join the process group, train as one of its ranks, and leave it.

    Args:
        join: forms the process groups from the parallel section and the local rank; default `join_world`.

    Raises what `train` raises.
    """
    # DeepSpeed's module, not torch's: it holds state of its own, which must be cleared before another world
    # is joined.
    from deepspeed import comm as dist

    from eagle_ds.training.train import train
    from eagle_ds.training.world import join_world

    joined_here = not dist.is_initialized()
    train(recipe, (join or join_world)(recipe.parallel, local_rank), _measure_acceptance)
    if joined_here:
        dist.destroy_process_group()


def _measure_acceptance(*args: Any) -> dict[str, Any]:
    # Imported at the first measurement: it needs transformers, which most runs never use.
    from eagle_ds.evaluation.acceptance import measure_during_training

    return measure_during_training(*args)


def _prepare_environment(local_processes: int, accelerator: str | None) -> None:
    """Set PATH and OMP_NUM_THREADS. Call it before torch is imported, which reads them once.

    DeepSpeed and Triton look for ninja in PATH; it is installed next to this Python. Processes on a CPU share
    its cores: torch's default of one thread per core in each process would make all of them slower.
    """
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")
    if accelerator == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", str(max(usable_cores() // local_processes, 1)))


def usable_cores() -> int:
    """Return how many cores this process may use: its affinity, limited by the container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    if quota_file.is_file():
        quota, period = quota_file.read_text().split()
        if quota != "max":
            cores = min(cores, max(int(quota) // int(period), 1))
    return cores


def set_aside(run_dir: Path) -> None:
    """Rename an existing run folder, for ``--fresh``. Raises ValueError if a run is active in it."""
    if run_dir.exists():
        if lock := lock_run(run_dir):  # succeeds only if no other run is active
            lock.close()
        kept = run_dir.with_name(f"{run_dir.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
        run_dir.rename(kept)
        logger.info("--fresh: the earlier run is kept in %s", kept)


def _free_port() -> int:
    """Return DeepSpeed's default port, or any free port if another run uses it."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", DEEPSPEED_PORT)) != 0:
            return DEEPSPEED_PORT
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
