#!/usr/bin/env bash
# llama3_128k: an EAGLE-3 draft for Llama-3.1-8B-Instruct, trained on sequences of up to 131072 tokens on 8 GPUs.
#
# Why these values:
#   target.aux_layer_ids null     [1, L//2-1, L-4] = layers 1, 15 and 28, what SGLang and vLLM take by default
#   draft sizes                   the target's own layer, as every published draft for it has (so embeddings are shared)
#   draft.vocab_size 32000        the head is the widest matrix of a step; the 32000 commonest trained tokens cover chats
#   draft.rope_*                  the target's own: trained to 131072, and a missing base means 10000 to a server
#   parallel.ulysses 8, ring 1    8 KV heads on 8 GPUs: one each, nothing replicated, K_0/V_0 sent once per sequence
#   data.pack_tokens 131072       a batch is a number of tokens: one long sample, or many short ones side by side
#   training.recompute none       25 GiB of a GPU's 80 as it is (--plan); selective 21 or full 13 on smaller GPUs, or for longer samples
#   training.gradient_clipping 0.5, betas (0.9, 0.95)   as EAGLE's own training code has them
#   deepspeed zero1               425 million trained parameters: optimizer state is worth spreading, weights are not
#
# Ran on: its true shapes with synthetic features on one H200 (9.6 s and 105 GiB a step with recompute selective, 10.0 s and 53 GiB
# with full) and on four (2.50 s and 41 GiB with none, 2.62 s and 17 GiB with full); never yet on eight GPUs: docs/benchmarks/h200.md
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
    main(__file__)
# end of recipe
