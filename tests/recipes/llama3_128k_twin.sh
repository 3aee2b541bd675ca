#!/usr/bin/env bash
# llama3_128k_twin: recipes/llama3_128k at a small scale, for tests: same layout, ratio of heads and DeepSpeed
# JSON.
""":"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python="$root/.venv/bin/python"; [ -x "$python" ] || python=python3
ready='import importlib.util as u, sys; sys.exit(u.find_spec("deepspeed") is None)'
"$python" -c "$ready" || { echo "error: $python has no deepspeed; run make venv first" >&2; exit 2; }
exec "$python" -u "${BASH_SOURCE[0]}" "$@"
: <<'# end of recipe'
":"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eagle_ds.launch import main

if __name__ == "__main__":
    main(__file__, accelerator="cpu")
# end of recipe
