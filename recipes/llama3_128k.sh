#!/usr/bin/env bash
# llama3_128k: trains an EAGLE-3 draft for Llama-3.1-8B-Instruct on up to 131072 tokens, on 8 GPUs.
#
# The steps of a run:
#   1. Capture the target's hidden states: python tools/prepare_hidden_states.py --recipe recipes/llama3_128k.json
#   2. Check memory, time and files:       recipes/llama3_128k.sh --plan
#   3. Train; the same command resumes:    deepspeed --num_gpus 8 recipes/llama3_128k.sh
#   4. Export for SGLang and vLLM:         python tools/export_draft.py runs/llama3_128k
# The values are in recipes/llama3_128k.json. Copy both files under a new name to make your own recipe.
#
# Why these values:
#   target.aux_layer_ids null     The draft reads the outputs of layers [1, L//2-1, L-4], here 1, 15 and 28.
#                                 SGLang and vLLM read these layers by default.
#   draft sizes                   Those of one layer of the target. With the same hidden size, the draft and
#                                 the target share one embedding.
#   draft.vocab_size 32000        The output head is the widest matrix of a TTT step. The 32000 most frequent
#                                 trained tokens cover chats; the full 128256 would make the head four times
#                                 as large.
#   draft.rope_*                  The target's own, which reach 131072 tokens. They must be written out: if
#                                 the base is missing, a serving engine uses 10000.
#   parallel.ulysses 8, ring 1    The target has 8 KV heads: each GPU gets one, no head is replicated, and
#                                 K_0/V_0 are exchanged once per sequence.
#   data.pack_tokens 131072       A pack holds up to this many tokens: one long sample, or many short ones.
#   data.overlong truncate        The first 131072 tokens of a longer sample are still useful.
#   training.ttt_steps 7          EAGLE-3's own number of TTT steps.
#   training.recompute none       Fastest. A GPU needs 25 GiB (see --plan). For longer sequences or smaller
#                                 GPUs, "selective" needs 21 GiB and "full" 13 GiB.
#   training.gradient_clipping 0.5, betas (0.9, 0.95)
#                                 As in EAGLE's own training code.
#   deepspeed zero1               The draft has 425 million trained parameters. Partitioning the optimizer
#                                 state saves memory; partitioning weights would add communication and save
#                                 little.
#
# Measured: with these shapes and synthetic features, one step with every row trained takes 9.6 s and 105 GiB
# on one H200 with recompute selective (10.0 s and 53 GiB with full), and 2.50 s and 41 GiB per GPU on four
# with none (2.62 s and 17 GiB with full). Not yet run on eight GPUs. See docs/benchmarks/h200.md.
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
