"""Realistic hidden states for benchmarks: the embedded target's own, widened and tiled to the size of a large model.

Gaussian numbers lie about compression: a trained network's channels differ by orders of magnitude, which is what an entropy
coder lives on. So SmolLM2 reads the Python manual (it comes with every CPython), a few passages at once, and the states of
those passages are laid side by side to H = 4096 and one after the other to S tokens. Chunks hold 64 rows and are
compressed alone, and gzip looks back 32 KB, four rows: neither sees that the rows repeat.
"""

from __future__ import annotations

import logging
from pathlib import Path
from pydoc_data.topics import topics

import torch

from eagle_ds.store.format import Sample
from eagle_ds.store.manifest import StoreInfo
from eagle_ds.target.files import read_config

logger = logging.getLogger(__name__)

States = tuple[torch.Tensor, torch.Tensor]  # bfloat16: aux [PASSAGE_TOKENS, 3 * width], hidden [PASSAGE_TOKENS, width]

PASSAGE_TOKENS = 1024


def capture_states(folder: Path, width: int) -> States:
    """Hidden states of the target in ``folder``, laid side by side; about a minute on two cores."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # the manual is longer than the target's context; it is cut into passages below
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    narrow, layers = model.config.hidden_size, model.config.num_hidden_layers
    passages = -(-width // narrow)
    text = "\n\n".join(topics.values())
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
    logger.info("%d passages of %d tokens through %s", passages, PASSAGE_TOKENS, folder)
    with torch.inference_mode():
        states = model(
            ids[: passages * PASSAGE_TOKENS].view(passages, -1), output_hidden_states=True, use_cache=False, logits_to_keep=1
        ).hidden_states
    wide = [_side_by_side(states[layer + 1], width) for layer in aux_layers(layers)]
    return torch.cat(wide, dim=1), _side_by_side(states[-1], width)


def make_sample(states: States, num_tokens: int, turn_tokens: int = 2048) -> Sample:
    """The states tiled to ``num_tokens``; half of the rows trained, in turns."""
    aux, hidden = (_tiled(part, num_tokens) for part in states)
    positions = torch.arange(num_tokens, dtype=torch.int32)
    turn = min(turn_tokens, max(1, num_tokens // 2))
    mask = (positions // turn % 2).to(torch.uint8)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32_000, (num_tokens,), generator=generator, dtype=torch.int32)
    return Sample(f"bench-{num_tokens}", ids, mask, aux, hidden, ids.clone(), torch.randn(num_tokens, generator=generator))


def info_for(folder: Path, width: int) -> StoreInfo:
    """Facts of a store of such samples."""
    config = read_config(folder)
    layers = aux_layers(config["num_hidden_layers"])
    return StoreInfo(f"{folder.name}, widened", "bench", "bench", width, layers, config["vocab_size"])


def aux_layers(num_layers: int) -> tuple[int, int, int]:
    """The layers that EAGLE-3 drafts read by default."""
    return (1, num_layers // 2 - 1, num_layers - 4)


def _side_by_side(states: torch.Tensor, width: int) -> torch.Tensor:
    """[passages, tokens, h] -> bfloat16 [tokens, width]."""
    return states.transpose(0, 1).flatten(1)[:, :width].to(torch.bfloat16).contiguous()


def _tiled(rows: torch.Tensor, num_tokens: int) -> torch.Tensor:
    whole = rows.repeat(-(-num_tokens // len(rows)), 1)
    return whole if len(whole) == num_tokens else whole[:num_tokens].clone()  # torch.save writes all of a view's storage
