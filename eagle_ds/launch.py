"""What every ``recipes/NAME.sh`` calls: help, plan, start the launcher, or train as one of its ranks.

A recipe is bash and Python at once. Under ``deepspeed --num_gpus 8 recipes/NAME.sh`` it runs as Python with RANK
set and trains. Under ``bash recipes/NAME.sh`` its header hands it to Python with no RANK: then this module starts
the DeepSpeed launcher with as many processes as fit. Nothing heavy is imported before it is needed, so that
``--help``, ``--plan`` and every complaint about a recipe come at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle_ds.config.recipe import ParallelConfig, Recipe, load_recipe
from eagle_ds.config.settings import dotted_fields, section_of
from eagle_ds.training.preflight import check_files, check_layout

if TYPE_CHECKING:
    from eagle_ds.training.world import World

logger = logging.getLogger(__name__)

FAILED, USAGE_ERROR = 1, 2
DEEPSPEED_PORT = 29500

USAGE = """\
Train:       deepspeed --num_gpus {world} {script}
             bash {script}                      (starts the launcher with as many processes as fit)
Look first:  {script} --plan                    (resolved recipe, sharding, memory, time, files; starts nothing)
Change:      {script} --training.max_steps 10 --training.learning_rate 5e-5

options:
  --help            this text
  --plan            print what a run would do, and start nothing
  --num_gpus N      under bash or --plan: processes to start, or to plan for
  --gpu NAME        under --plan: plan for h200, h100, a100, b200 or cpu (default: what is here, else h200)
  --fresh           move the run folder aside and start anew; without it a run resumes from its newest checkpoint
  --local_rank I    given by the DeepSpeed launcher
  --SECTION.NAME V  any setting below; V is JSON or text; relative paths start at the repository

settings (with this recipe's values):
"""


@dataclass(frozen=True)
class Invocation:
    """One way of calling a recipe: its two files, its flags, the dotted overrides, and where it runs."""

    script: Path
    options: argparse.Namespace
    overrides: tuple[str, ...]
    accelerator: str | None

    @property
    def recipe_json(self) -> Path:
        """The JSON beside the script, relative to the repository where it lies inside."""
        path = self.script.with_suffix(".json")
        return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main(script: str, accelerator: str | None = None) -> None:
    """Run the recipe whose ``.sh`` file is ``script`` with the arguments of this process, and exit.

    ``accelerator``: DS_ACCELERATOR where the environment sets none ("cpu": the recipe is meant for CPUs).
    """
    path = Path(script).resolve()
    os.chdir(Path(__file__).resolve().parent.parent)
    options, overrides = _parse(sys.argv[1:])
    if accelerator:
        os.environ.setdefault("DS_ACCELERATOR", accelerator)
    call = Invocation(path, options, tuple(overrides), os.environ.get("DS_ACCELERATOR"))
    rank = int(os.environ.get("RANK", -1))
    level = logging.INFO if rank <= 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    try:
        if options.num_gpus is not None and options.num_gpus < 1:
            raise ValueError(f"--num_gpus {options.num_gpus} starts nothing; give 1 or more, or leave it out")
        recipe = load_recipe(call.recipe_json, overrides)
        if options.help or options.plan:
            if rank <= 0:
                sys.stdout.write(help_text(call, recipe) if options.help else _plan_text(call, recipe))
            return
        check_files(recipe, call.recipe_json, overrides)
        world_size = int(os.environ["WORLD_SIZE"]) if rank >= 0 else choose_world_size(recipe, options.num_gpus, call.accelerator)
        check_layout(recipe, world_size)
        if options.fresh and rank <= 0:
            set_aside(recipe.run_dir)
    except ValueError as error:
        _complain_once(error, USAGE_ERROR)
    if rank < 0:
        _start_launcher(call, world_size)
    _train(recipe, rank)


def enter_repository(arguments: argparse.Namespace, models: Sequence[str] = ("target", "baseline")) -> None:
    """Go to the repository, where the relative paths of a recipe start. Paths on the command line start where it was typed: they
    are made absolute first, those of ``models`` (a folder or a Hugging Face id) where such a folder exists."""
    root = Path(__file__).resolve().parent.parent
    if Path.cwd() == root:
        return
    for name, value in vars(arguments).items():
        if isinstance(value, Path) or (name in models and value and Path(value).exists()):
            setattr(arguments, name, type(value)(Path(value).absolute()))
    os.chdir(root)


def _complain_once(error: ValueError, code: int) -> None:
    """Exit with ``code`` and the message from a node's first rank alone. The others found the same and leave quietly: were they to fail
    too, the launcher might kill the first one before it has spoken."""
    if int(os.environ.get("LOCAL_RANK", 0)):
        sys.exit(0)
    sys.stderr.write(f"error: {error}\n")
    sys.exit(code)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--help", "--plan", "--fresh"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("-h", dest="help", action="store_true")
    parser.add_argument("--num_gpus", type=int)
    parser.add_argument("--gpu")
    parser.add_argument("--local_rank", "--local-rank", type=int)
    return parser.parse_known_args(argv)


def help_text(call: Invocation, recipe: Recipe) -> str:
    """The recipe's own header comments, the ways to call it, and every setting with its value here."""
    comments = [line for line in call.script.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    about = "\n".join(line.removeprefix("#").removeprefix(" ") for line in comments[1:-1])  # between shebang and end
    script = call.script.relative_to(Path.cwd()) if call.script.is_relative_to(Path.cwd()) else call.script
    values = recipe.model_dump()
    rows = []
    for name, field in dotted_fields(Recipe):
        value = values
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        shown = value if isinstance(value, str) else json.dumps(value)
        text = field.description if section_of(field) and value is not None else f"{shown}  {field.description}"
        rows.append(f"  --{name:<34} {text}")
    return f"{about}\n\n{USAGE.format(script=script, world=recipe.parallel.size)}" + "\n".join(rows) + "\n"


def _plan_text(call: Invocation, recipe: Recipe) -> str:
    from eagle_ds.estimate.plan import describe_plan

    world_size = int(os.environ.get("WORLD_SIZE", 0)) or call.options.num_gpus or recipe.parallel.size
    gpu = call.options.gpu or ("cpu" if call.accelerator == "cpu" else None)
    return describe_plan(recipe, call.recipe_json, world_size, gpu, call.overrides)


def choose_world_size(recipe: Recipe, wanted: int | None, accelerator: str | None) -> int:
    """Processes that ``bash NAME.sh`` starts: what was asked for, else all GPUs that make whole sequence groups.

    Raises ValueError if the GPUs do not suffice. On CPU one sequence group is started.
    """
    size = recipe.parallel.size
    if accelerator == "cpu":
        return wanted or size
    import torch

    here = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    world_size = wanted or here // size * size
    if not size <= world_size <= here:
        raise ValueError(
            f"{recipe.name} needs ulysses {recipe.parallel.ulysses} * ring {recipe.parallel.ring} = {size} GPUs"
            f"{f' and {wanted} were asked for' if wanted else ''}, but {here} can be seen; lower --parallel.ulysses or --parallel.ring"
            f"{'' if here else ', or set DS_ACCELERATOR=cpu to run on the CPU'}"
        )
    return world_size


def launcher_command(call: Invocation, world_size: int) -> list[str]:
    """The DeepSpeed launcher on this machine, with the flags that the ranks need."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    chosen = devices.split(",")[:world_size]
    if call.accelerator != "cpu" and len(chosen) == world_size and all(d.isdigit() for d in chosen):
        where = ["--include", f"localhost:{','.join(chosen)}"]  # --num_gpus would ignore CUDA_VISIBLE_DEVICES
    else:
        where = ["--num_gpus", str(world_size)]
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner", *where),
        *("--master_port", str(_free_port()), str(call.script), *call.overrides),
    ]


def _start_launcher(call: Invocation, world_size: int) -> None:
    command = launcher_command(call, world_size)
    logger.info("starting %d processes: %s", world_size, " ".join(command))
    _prepare_environment(world_size, call.accelerator)
    os.execv(command[0], command)


def _train(recipe: Recipe, rank: int) -> None:
    _prepare_environment(int(os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])), os.environ.get("DS_ACCELERATOR"))
    from eagle_ds.reporting.report import write_report
    from eagle_ds.training.agreement import RankFailure
    from eagle_ds.training.sizing import OutOfMemory
    from eagle_ds.training.stopping import leave_at_once

    try:
        train_rank(recipe, int(os.environ.get("LOCAL_RANK", 0)))
        if rank == 0:
            write_report(recipe.run_dir)
    except RankFailure as error:
        _complain_once(error, FAILED)
    except OutOfMemory as error:
        leave_at_once(f"error (rank {rank}): {error}", FAILED)
    except (ValueError, OSError) as error:
        logger.debug("%s", traceback.format_exc())
        sys.stderr.write(f"error (rank {rank}): {error}\n")
        sys.exit(FAILED)


def train_rank(recipe: Recipe, local_rank: int, join: Callable[[ParallelConfig, int], World] | None = None) -> None:
    """Join the world, train as one of its ranks, leave. ``join``: by default ``join_world``. Raises as ``train`` does."""
    from torch import distributed as dist

    from eagle_ds.training.train import train
    from eagle_ds.training.world import join_world

    joined_here = not dist.is_initialized()
    train(recipe, (join or join_world)(recipe.parallel, local_rank), _measure_acceptance)
    if joined_here:
        dist.destroy_process_group()


def _measure_acceptance(*args: Any) -> dict[str, Any]:
    from eagle_ds.evaluation.acceptance import measure_during_training  # imports transformers, which few runs need

    return measure_during_training(*args)


def _prepare_environment(local_processes: int, accelerator: str | None) -> None:
    """Before torch is imported: find ninja beside this Python, and share the cores among CPU processes."""
    beside = str(Path(sys.executable).parent)
    if beside not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = beside + os.pathsep + os.environ.get("PATH", "")
    if accelerator == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", str(max(usable_cores() // local_processes, 1)))


def usable_cores() -> int:
    """Cores this process may use: its affinity, and the container's CPU quota if there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    if quota_file.is_file():
        quota, period = quota_file.read_text().split()
        if quota != "max":
            cores = min(cores, max(int(quota) // int(period), 1))
    return cores


def set_aside(run_dir: Path) -> None:
    """Rename an existing run folder; nothing is ever deleted. Raises ValueError where a run is at work in it."""
    from eagle_ds.training.runlock import take_run

    if run_dir.exists():
        if lock := take_run(run_dir):
            lock.close()
        kept = run_dir.with_name(f"{run_dir.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
        run_dir.rename(kept)
        logger.info("--fresh: the earlier run is kept in %s", kept)


def _free_port() -> int:
    """DeepSpeed's usual port, or any free one if another run has it."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", DEEPSPEED_PORT)) != 0:
            return DEEPSPEED_PORT
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
