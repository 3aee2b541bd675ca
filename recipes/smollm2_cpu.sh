#!/usr/bin/env bash
# smollm2_cpu: an EAGLE-3 draft for SmolLM2-135M-Instruct on two CPU processes; what `make demo` trains.
#
# Small enough for two cores and 8 GB, and the same code path as the largest run: capture, store, a ring of two, DeepSpeed.
#
# Why these values:
#   target.dtype float32          the CPU path is exact, and acceptance is checked token for token in float32
#   draft sizes                   the target's own layer (so the frozen embedding is shared)
#   draft.vocab_size 4096         a twelfth of the target's 49152: the head is most of the work at this width
#   training.ttt_steps 3          a row costs as much as it has steps; minutes are better spent on more rows
#   draft.rope_theta 100000       the target's own
#   parallel.ring 2               9 query heads divide by 1, 3 and 9 only, so two processes make a ring
#   data.pack_tokens 512          many small steps: a draft that starts from nothing learns by their number
#   training.learning_rate 2e-3   a draft of 8 million weights takes a larger step than the 1e-4 of the 8B recipe
#
# Ran on: 2 CPU cores, 264 steps on 120 conversations in 238 s, 1.1 GiB a process: docs/benchmarks/demo.md
""":"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python="$root/.venv/bin/python"; [ -x "$python" ] || python=python3
ready='import importlib.util as u, sys; sys.exit(u.find_spec("deepspeed") is None)'
"$python" -c "$ready" || { echo "error: $python has no deepspeed; run make venv first" >&2; exit 2; }
exec "$python" -u "${BASH_SOURCE[0]}" "$@"
: <<'# end of recipe'
":"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eagle_ds.launch import main

if __name__ == "__main__":
    main(__file__, accelerator="cpu")
# end of recipe
