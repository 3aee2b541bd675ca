#!/usr/bin/env bash
# llama3_128k_twin: recipes/llama3_128k scaled down for tests: same layout, same ratio of heads, same DeepSpeed JSON.
""":"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python="$root/.venv/bin/python"; [ -x "$python" ] || python=python3
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
