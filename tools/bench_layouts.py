#!/usr/bin/env python3
"""Train the same draft from the same start on the same data under several layouts, and compare the losses.

    tools/bench_layouts.py --out DIR                                   all GPUs: every layout that fits them
    tools/bench_layouts.py --out DIR --share-gpu                       one GPU, shared by four processes
    tools/bench_layouts.py --out DIR --device cpu --max-relative 1e-4  CPU, float32: four processes over gloo
    tools/bench_layouts.py --out DIR --layouts 1 U2 R2:p2p             these layouts only
    tools/bench_layouts.py --out DIR --steps 200 --layouts 1/float32 1/bfloat16    compare precisions

What it measures: whether all layouts (or precisions) compute the same training.

How: a layout is U and R with their degrees: U2R2. With R, ":gather" or ":p2p" sets the ring mode, in which
K_0/V_0 are exchanged; the default chooses by memory. "1" is one process. "/float32" or "/bfloat16" at the end
sets the dtype of that run. Each layout is a run of its own through the trainer (DeepSpeed launcher, HDF5
store, AdamW, ZeRO-1) in the folder DIR/LAYOUT. The target has random weights, and the store holds tokens that
a draft can learn to predict, so the loss falls as in a real run. All runs read the same states.

--share-gpu: NCCL refuses two processes on one GPU. With this option, processes share the GPUs and exchange
tensors through host memory. One GPU can then train every layout of four processes with the GPU's kernels. The
losses are valid, the times mean nothing.

How to read the result: the losses are compared with those of the first layout, as by tools/compare_runs.py.
It prints a table and writes DIR/compare.json and DIR/compare.png. Rounding gives relative differences near
1e-7 in float32 and 1e-3 in bfloat16 that grow slowly; a wrong gradient shows within a few steps.

Exit code: 0; 1 if a layout differs by more than --max-relative; 2 if a run failed.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eagle_ds  # noqa: F401  first: explains how to install missing packages

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = ("1", "U2", "R2:gather", "R2:p2p", "U2R2:gather", "U2R2:p2p", "U4", "R4:gather", "R4:p2p")
CPU_PROCESSES = 4  # number of processes on a CPU, and at least this many if they share a GPU


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for data, runs and comparison"
    )
    layouts = f"default: those of {' '.join(LAYOUTS)} that fit the GPUs"
    parser.add_argument("--layouts", nargs="+", help=layouts)
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of each run")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument(
        "--share-gpu", action="store_true", help="let processes share GPUs, through host memory"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"),
        help="dtype of layouts that set none; default: float32 on CPU, else bfloat16"
    )
    parser.add_argument(
        "--tokens", type=int, help="tokens of each sample; default: 8192 on GPUs (for cuDNN), 128 on CPU"
    )
    parser.add_argument(
        "--hidden", type=int, help="width of target and draft; default: 1024 on GPUs, 64 on CPU"
    )
    limit = "exit code 1 if a loss differs by more than X times the first layout's"
    parser.add_argument("--max-relative", type=float, metavar="X", help=limit)
    # compare_layouts starts this tool again with --train for each process of a run.
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    parser.add_argument("--local_rank", type=int, default=local_rank, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.train:
        return train_as_rank(options)
    try:
        return compare_layouts(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def train_as_rank(options: argparse.Namespace) -> int:
    """Run one process of a training run; return its exit code."""
    os.chdir(ROOT)
    from eagle_ds.bench.simulated_world import join_shared_gpu
    from eagle_ds.config.recipe import load_recipe
    from eagle_ds.launch import train_rank
    from eagle_ds.training.sizing import OutOfMemory
    from eagle_ds.training.stopping import leave_at_once

    logging.basicConfig(level=logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    try:
        train_rank(
            load_recipe(options.train), options.local_rank, join_shared_gpu if options.share_gpu else None
        )
    except OutOfMemory as error:
        leave_at_once(f"error: {error}", 1)
    return 0


def compare_layouts(options: argparse.Namespace) -> int:
    """Make the data, train each layout, and return the exit code of the comparison."""
    import torch

    from eagle_ds.bench.synthetic_data import Playground, Sizes
    from eagle_ds.config.outputs import check_output_folder

    check_output_folder(options.out, "--out")
    accelerator = options.device
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; leave the option out, or use --device cpu")
    if accelerator == "cuda":
        processes, dtype, sizes = torch.cuda.device_count(), "bfloat16", Sizes()
        processes = max(processes, CPU_PROCESSES) if options.share_gpu else processes
    else:
        processes, dtype, sizes = CPU_PROCESSES, "float32", Sizes(
            hidden=64, vocab=211, tokens=128, ttt_steps=3
        )
    given = {name: value for name in ("tokens", "hidden") if (value := getattr(options, name))}
    place = Playground(options.out.resolve(), replace(sizes, **given))
    layouts = choose_layouts(options.layouts, processes)
    place.root.mkdir(parents=True, exist_ok=True)
    place.make_data()
    for layout in layouts:
        dtype_of_run = layout.dtype or options.dtype or dtype
        recipe = place.write_recipe(layout.name, layout.parallel, dtype_of_run, options.steps)
        train(recipe, layout.processes, accelerator, share_gpu=options.share_gpu)
    runs = [str(place.root / layout.name) for layout in layouts]
    limit = ["--max-relative", str(options.max_relative)] if options.max_relative is not None else []
    labels = ["--labels", *(layout.name.replace("_", " ") for layout in layouts)]
    command = [sys.executable, str(ROOT / "tools/compare_runs.py"), *runs, "--out", str(place.root)]
    return subprocess.call([*command, *labels, *limit])


@dataclass(frozen=True)
class Layout:
    """The layout of one run."""

    name: str  # name of the run and of its folder
    parallel: dict[str, Any]  # section "parallel" of the recipe
    dtype: str | None

    @property
    def processes(self) -> int:
        return self.parallel["ulysses"] * self.parallel["ring"]


def read_layout(text: str) -> Layout:
    """Parse a layout such as U2R2:p2p/float32. Raises ValueError for any other text."""
    # "1", or U and R with their degrees (at least one of them), then a dtype.
    degrees = r"(?:1|(?=[UR])(?:U(\d+))?(?:R(\d+)(?::(auto|gather|p2p))?)?)"
    found = re.fullmatch(degrees + r"(?:/(float32|bfloat16))?", text)
    if not found:
        raise ValueError(f"{text} is not a layout; write 1, U4, R2:p2p, U2R2:gather or 1/float32")
    parallel = {"ulysses": int(found[1] or 1), "ring": int(found[2] or 1), "ring_mode": found[3] or "auto"}
    return Layout(text.replace(":", "_").replace("/", "_"), parallel, found[4])


def choose_layouts(texts: Sequence[str] | None, processes: int) -> list[Layout]:
    """Return the layouts in ``texts``, or all that fit.

    Raises ValueError if a layout does not fit, or if there are fewer than two.
    """
    layouts = [read_layout(text) for text in texts or LAYOUTS]
    if texts is None:
        layouts = [layout for layout in layouts if layout.processes <= processes]
    if large := [layout for layout in layouts if layout.processes > processes]:
        found = f"layout {large[0].name} needs {large[0].processes} processes, but {processes} fit here"
        raise ValueError(f"{found}; leave it out (with --share-gpu, {CPU_PROCESSES} fit on one GPU)")
    if len(layouts) < 2:
        found = f"layout {layouts[0].name} alone leaves nothing to compare"
        raise ValueError(f"{found}; name two, such as 1/float32 1/bfloat16, or give --share-gpu on one GPU")
    return layouts


def train(recipe: Path, processes: int, accelerator: str, *, share_gpu: bool) -> None:
    """Start a launcher that trains one layout from the beginning. Raises ValueError if the run fails."""
    from eagle_ds.launch import set_aside

    set_aside(recipe.with_suffix(""))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = launcher(processes, port, share_gpu=share_gpu)
    command = [*start, str(Path(__file__).resolve()), "--out", str(recipe.parent)]
    command += ["--train", str(recipe), *(["--share-gpu"] if share_gpu else [])]
    environment = {**os.environ, "DS_ACCELERATOR": accelerator}
    if accelerator == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
    # DeepSpeed looks for ninja in PATH.
    paths = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    environment["PATH"] = os.pathsep.join(paths)
    log = recipe.with_suffix(".txt")
    print(f"{recipe.stem}: {processes} processes, log in {log}", file=sys.stderr)
    with log.open("w") as stream:
        code = subprocess.call(command, env=environment, stdout=stream, stderr=stream)
    if code:
        end = f"the end of {log}:\n{log.read_text()[-2000:]}"
        raise ValueError(f"the run {recipe.stem} failed with exit code {code}; {end}")


def launcher(processes: int, port: int, *, share_gpu: bool) -> list[str]:
    """Return the launcher's command: DeepSpeed's, or torch's if processes share a GPU.

    DeepSpeed's launcher starts no more processes than there are GPUs.
    """
    place = ["--master_port", str(port)]
    if share_gpu:
        return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), *place]
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(processes), *place]


if __name__ == "__main__":
    sys.exit(main())
