#!/usr/bin/env python
"""Train the same draft from the same start on the same data under several layouts, and compare the losses.

    tools/bench_layouts.py --out results/layouts                                   (all GPUs here: every layout that they carry)
    tools/bench_layouts.py --out results/layouts --share-gpu                       (one GPU: four processes share it)
    tools/bench_layouts.py --out results/layouts --device cpu --max-relative 1e-4  (CPU, float32: four processes over gloo)
    tools/bench_layouts.py --out results/layouts --layouts 1 U2 R2:p2p

A layout is U and R with their degrees, and with R how K_0/V_0 travel: U2R2 (by memory), R2:gather, R2:p2p; 1 is one process.
/float32 or /bfloat16 behind it says what that run computes in; all read the same states. So a training in bfloat16 is held to
the float32 one by:
    tools/bench_layouts.py --out results/precision --steps 200 --layouts 1/float32 1/bfloat16
The target is made up, and the store holds tokens that a draft can learn to predict, so the loss falls as in a real run. Each
layout is a run of its own through the trainer (DeepSpeed launcher, HDF5 store, AdamW, ZeRO-1); its folder is DIR/LAYOUT. Losses
are compared with the first layout's, as by tools/compare_runs.py: a table, DIR/compare.json and DIR/compare.png.

--share-gpu: NCCL refuses two processes on one GPU. With it processes share the GPUs there are and talk through host memory, so
that one GPU trains every layout of four processes with its own kernels. The losses count, the times do not.

Exit code: 0; 1 if some layout differs by more than --max-relative; 2 if a run failed.
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

import eagle_ds  # noqa: F401  before any package: says so where they are missing

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = ("1", "U2", "R2:gather", "R2:p2p", "U2R2:gather", "U2R2:p2p", "U4", "R4:gather", "R4:p2p")
CPU_PROCESSES = 4  # on CPU, and where processes share a GPU


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for data, runs and the comparison")
    parser.add_argument("--layouts", nargs="+", help=f"default: those of {' '.join(LAYOUTS)} that fit the GPUs")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of each run")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--share-gpu", action="store_true", help="several processes on a GPU, talking through host memory")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of layouts that say none; default: float32 on CPU only")
    parser.add_argument("--tokens", type=int, help="of each sample; default: 8192 on GPUs (long enough for cuDNN), 128 on CPU")
    parser.add_argument("--hidden", type=int, help="width of target and draft; default: 1024 on GPUs, 64 on CPU")
    parser.add_argument("--max-relative", type=float, metavar="X", help="exit code 1 if a loss is off by more than X times the first's")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)  # what a process of a run is started with
    parser.add_argument("--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", 0)), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.train:
        return be_a_rank(options)
    try:
        return compare_layouts(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def be_a_rank(options: argparse.Namespace) -> int:
    """One process of a run."""
    os.chdir(ROOT)
    from eagle_ds.bench.simulated_world import join_shared_gpu
    from eagle_ds.config.recipe import load_recipe
    from eagle_ds.launch import train_rank
    from eagle_ds.training.sizing import OutOfMemory
    from eagle_ds.training.stopping import leave_at_once

    logging.basicConfig(level=logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    try:
        train_rank(load_recipe(options.train), options.local_rank, join_shared_gpu if options.share_gpu else None)
    except OutOfMemory as error:
        leave_at_once(f"error: {error}", 1)
    return 0


def compare_layouts(options: argparse.Namespace) -> int:
    """Data, a run for each layout, and the comparison's exit code."""
    import torch

    from eagle_ds.bench.synthetic_data import Playground, Sizes
    from eagle_ds.config.outputs import check_output_folder

    check_output_folder(options.out, "--out")
    accelerator = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; leave the option out, or give --device cpu")
    if accelerator == "cuda":
        processes, dtype, sizes = torch.cuda.device_count(), "bfloat16", Sizes()
        processes = max(processes, CPU_PROCESSES) if options.share_gpu else processes
    else:
        processes, dtype, sizes = CPU_PROCESSES, "float32", Sizes(hidden=64, vocab=211, tokens=128, ttt_steps=3)
    given = {name: value for name in ("tokens", "hidden") if (value := getattr(options, name))}
    place = Playground(options.out.resolve(), replace(sizes, **given))
    layouts = choose_layouts(options.layouts, processes)
    place.root.mkdir(parents=True, exist_ok=True)
    place.make_data()
    for layout in layouts:
        recipe = place.write_recipe(layout.name, layout.parallel, layout.dtype or options.dtype or dtype, options.steps)
        train(recipe, layout.processes, accelerator, share_gpu=options.share_gpu)
    runs = [str(place.root / layout.name) for layout in layouts]
    limit = ["--max-relative", str(options.max_relative)] if options.max_relative is not None else []
    return subprocess.call([sys.executable, str(ROOT / "tools/compare_runs.py"), *runs, "--out", str(place.root), *limit])


@dataclass(frozen=True)
class Layout:
    """What one run is started with."""

    name: str  # of its folder
    parallel: dict[str, Any]  # of its recipe
    dtype: str | None

    @property
    def processes(self) -> int:
        return self.parallel["ulysses"] * self.parallel["ring"]


def read_layout(text: str) -> Layout:
    """U2R2:p2p/float32. Raises ValueError for anything else."""
    found = re.fullmatch(r"(?:1|(?=[UR])(?:U(\d+))?(?:R(\d+)(?::(auto|gather|p2p))?)?)(?:/(float32|bfloat16))?", text)
    if not found:
        raise ValueError(f"{text} is no layout; write 1, U4, R2:p2p, U2R2:gather or 1/float32")
    parallel = {"ulysses": int(found[1] or 1), "ring": int(found[2] or 1), "ring_mode": found[3] or "auto"}
    return Layout(text.replace(":", "_").replace("/", "_"), parallel, found[4])


def choose_layouts(texts: Sequence[str] | None, processes: int) -> list[Layout]:
    """Those named, or all that so many processes can carry. Raises ValueError for one that they cannot, or nothing to compare."""
    layouts = [read_layout(text) for text in texts or LAYOUTS]
    if texts is None:
        layouts = [layout for layout in layouts if layout.processes <= processes]
    if large := [layout for layout in layouts if layout.processes > processes]:
        found = f"layout {large[0].name} takes {large[0].processes} processes and {processes} fit here"
        raise ValueError(f"{found}; leave it out (with --share-gpu {CPU_PROCESSES} fit on one GPU)")
    if len(layouts) < 2:
        found = f"layout {layouts[0].name} alone leaves nothing to compare"
        raise ValueError(f"{found}; name two that run here, such as 1/float32 1/bfloat16, or on one GPU give --share-gpu")
    return layouts


def train(recipe: Path, processes: int, accelerator: str, *, share_gpu: bool) -> None:
    """One run by a launcher, from the start. Raises ValueError if it fails."""
    from eagle_ds.launch import set_aside

    set_aside(recipe.with_suffix(""))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*launcher(processes, port, share_gpu=share_gpu), str(Path(__file__).resolve()), "--out", str(recipe.parent)]
    command += ["--train", str(recipe), *(["--share-gpu"] if share_gpu else [])]
    environment = {**os.environ, "DS_ACCELERATOR": accelerator, **({"OMP_NUM_THREADS": "1"} if accelerator == "cpu" else {})}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # DeepSpeed looks for ninja there
    log = recipe.with_suffix(".txt")
    print(f"{recipe.stem}: {processes} processes, log in {log}", file=sys.stderr)
    with log.open("w") as stream:
        code = subprocess.call(command, env=environment, stdout=stream, stderr=stream)
    if code:
        raise ValueError(f"the run {recipe.stem} ended with exit code {code}; the end of {log}:\n{log.read_text()[-2000:]}")


def launcher(processes: int, port: int, *, share_gpu: bool) -> list[str]:
    """DeepSpeed's, or torch's where processes share a GPU: DeepSpeed's starts no more of them than there are GPUs."""
    if share_gpu:
        return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(processes), "--master_port", str(port)]


if __name__ == "__main__":
    sys.exit(main())
