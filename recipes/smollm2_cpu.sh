#!/usr/bin/env bash
# smollm2_cpu: trains an EAGLE-3 draft for SmolLM2-135M-Instruct in two CPU processes. "make demo" runs it.
#
# It is small enough for two cores and 4 GB of memory, and it uses the same code as the largest run: capture,
# store, a ring of two ranks, DeepSpeed. Use it to see all stages work before you use GPUs.
# The values are in recipes/smollm2_cpu.json. Copy both files under a new name to make your own recipe.
#
# Why these values:
#   target.dtype float32          The CPU path computes in float32, so that real decoding can be compared with
#                                 the target's own answers token by token.
#   draft sizes                   Those of one layer of the target, so that draft and target share one
#                                 embedding.
#   draft.vocab_size 4096         A twelfth of the target's 49152 tokens. With this small hidden size, most of
#                                 the work is in the output head.
#   training.ttt_steps 3          Each TTT step costs time for every row. In the few minutes of a demo, more
#                                 rows help more than more TTT steps.
#   draft.rope_theta 100000       The target's own.
#   parallel.ring 2               Ulysses needs a divisor of the 9 query heads: 1, 3 or 9. Two processes can
#                                 only form a ring.
#   data.pack_tokens 512          Small batches give many optimizer steps, and a draft that starts from random
#                                 weights needs many steps.
#   training.learning_rate 2e-3   A draft of 7.4 million parameters trains well with a higher rate than the 1e-4
#                                 of the 8B recipe.
#
# Measured: 264 steps on 120 conversations take 238 s on 2 CPU cores, with 1.1 GiB per process. See
# docs/benchmarks/demo.md.
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
