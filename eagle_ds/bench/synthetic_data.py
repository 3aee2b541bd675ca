"""Data that benchmarks make for themselves: documents, random stores, realistic hidden states, and a store
that can be learned.

1. ``random_store`` makes stores of random states, to time steps that read from disk. Nothing can be learned
   from them. One block of normal random states is repeated along each sample. Chunks of 64 rows are
   compressed one by one, so compression cannot exploit the repetition, and random bfloat16 numbers compress
   about as well as real states.

2. ``capture_states`` makes realistic hidden states, to measure compression. Gaussian numbers would be
   misleading: the channels of a trained network differ by orders of magnitude, and that is what an entropy
   coder exploits. SmolLM2 reads the Python manual (part of every CPython) in a few passages at once. The
   states of the passages are placed side by side to H = 4096, and repeated to S tokens. Neither our chunks of
   64 rows nor gzip, whose window of 32 KB holds four rows, can see that rows repeat.

3. ``Playground`` makes a small target and a store from which a draft can learn, to compare training runs.
   Tokens mostly follow a fixed permutation, and the hidden state at a token points to the head's row of the
   next token. So the loss falls within a few dozen steps, as in a real run, and a wrong gradient becomes
   visible.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from eagle_ds.config.recipe import Recipe
from eagle_ds.config.sections import default_aux_ids
from eagle_ds.estimate.sequences import document_in_turns
from eagle_ds.sharding import ranges as rg
from eagle_ds.sharding.sequence import Document
from eagle_ds.store.format import TORCH_DTYPES, Sample
from eagle_ds.store.manifest import STORE_JSON, StoreInfo
from eagle_ds.store.store import Store, StoreWriter
from eagle_ds.target.files import read_config
from eagle_ds.target.identity import target_hash

logger = logging.getLogger(__name__)

BLOCK_ROWS = 1024  # rows of the random block that a random sample repeats
MAX_WORKERS = 32
# a random store has at least 4 samples up to this length and 2 beyond it (4 GB each at 128K)
FEW_TOKENS = 65_536


def document_in_exact_turns(num_tokens: int, fraction: float, turn: int) -> Document:
    """Return ``document_in_turns``, but raise ValueError if the document is too short for one whole period.

    A single turn in a short document would be another fraction than requested.
    """
    document = document_in_turns(num_tokens, fraction, turn)
    if fraction < 1 and turn / fraction > num_tokens:
        longest = max(int(num_tokens * fraction), 1)
        too_long = f"a turn of {turn} tokens is more than {fraction:g} of {num_tokens}"
        raise ValueError(f"{too_long}; give --turn {longest} or less")
    return document


def default_samples(num_tokens: int, per_step: int) -> int:
    """Return how many samples a random store needs, so that two steps in a row read different files."""
    least = 4 if num_tokens <= FEW_TOKENS else 2
    return per_step * max(-(-least // per_step), 2)


def random_store(root: Path, recipe: Recipe, document: Document, count: int, *, dtype: str) -> Store:
    """Open the store at ``root``, after adding random samples until it has ``count``.

    Existing samples are kept. A complete store is only read, so many processes may open it at once.

    Args:
        root: folder of the store.
        recipe: gives the hidden size, the captured layers and the vocabulary size.
        document: length and trained spans of every sample.
        count: number of samples.
        dtype: of the hidden states, "bfloat16" or "float32".

    Raises:
        ValueError: the store there has other sizes, its samples have another shape, or the disk is too small.
    """
    target = recipe.target
    sizes = target.hidden_size, target.aux_ids, target.vocab_size
    info = StoreInfo("random", "random", "random", *sizes, dtype=dtype)
    names = [f"random-{number}" for number in range(count)]
    if not _is_complete(root, info, names):
        with StoreWriter(root, info, workers=min(os.cpu_count() or 1, MAX_WORKERS)) as writer:
            _write_random(writer, [name for name in names if name not in writer.done_ids], document)
    store = Store(root)
    _check_shape(store, document)
    return store


def _is_complete(root: Path, info: StoreInfo, names: list[str]) -> bool:
    if not (root / STORE_JSON).is_file():
        return False
    store = Store(root)
    return store.info == info and {entry.id for entry in store.entries} >= set(names)


def _check_shape(store: Store, document: Document) -> None:
    """Raise ValueError unless every sample has the length and the trained spans of ``document``."""
    trained = rg.count(document.trained_spans)
    wanted = document.num_tokens, document.trained_spans
    for entry in store.entries:
        if (entry.num_tokens, rg.normalize(entry.trained_spans)) != wanted:
            raise ValueError(
                f"{store.root} holds a sample of {entry.num_tokens} tokens with {entry.num_trained} trained, "
                f"but this benchmark times {document.num_tokens} tokens with {trained} trained; give another "
                "folder, or delete that one"
            )


def _write_random(writer: StoreWriter, names: list[str], document: Document) -> None:
    info, size, dtype = writer.info, document.num_tokens, TORCH_DTYPES[writer.info.dtype]
    width = (len(info.aux_layer_ids) + 1) * info.hidden_size
    num_bytes = len(names) * size * width * dtype.itemsize
    _check_disk_space(writer.root, num_bytes)
    what = f"{len(names)} random samples of {size} tokens"
    logger.info("writing %s (%.1f GB) into %s", what, num_bytes / 1e9, writer.root)
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    states = _tiled(torch.randn(min(BLOCK_ROWS, size), width, generator=generator).to(dtype), size)
    aux, hidden = states[:, : -info.hidden_size], states[:, -info.hidden_size :]
    mask = _mask(size, document.trained_spans)
    for name in names:
        ids = np.random.default_rng(len(writer.done_ids)).integers(
            0, info.vocab_size, (2, size), dtype=np.int32
        )
        labels = torch.from_numpy(ids[1]), torch.full((size,), 10.0)
        writer.add(Sample(name, torch.from_numpy(ids[0]), mask, aux, hidden, *labels))
    seconds = time.perf_counter() - started
    logger.info("written in %.1f s, %.0f MB/s", seconds, num_bytes / 1e6 / seconds)


def _check_disk_space(root: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(root).free
    if num_bytes > free:
        raise ValueError(
            f"random samples of this shape need up to {num_bytes / 1e9:.1f} GB, but {root} has "
            f"{free / 1e9:.1f} GB free; give a folder on a larger disk, or fewer samples"
        )


def _mask(size: int, spans: rg.Ranges) -> Tensor:
    """Return the loss mask, uint8 [size], of trained spans."""
    mask = np.zeros(size, dtype=np.uint8)
    mask[rg.rows(spans)] = 1
    return torch.from_numpy(mask)


def _tiled(block: Tensor, num_tokens: int) -> Tensor:
    """Repeat the rows of ``block`` to [num_tokens, width]."""
    whole = block.repeat(-(-num_tokens // len(block)), 1)
    # A view would keep the longer tensor's storage, and torch.save would write all of it.
    return whole if len(whole) == num_tokens else whole[:num_tokens].clone()


# ------------------------------------------------------------------------------------------------------------
# Realistic hidden states

States = tuple[Tensor, Tensor]
"""bfloat16 states of aux layers [PASSAGE_TOKENS, 3 * width] and of the last layer [PASSAGE_TOKENS, width]."""

PASSAGE_TOKENS = 1024


def capture_states(folder: Path, width: int) -> States:
    """Run the target in ``folder`` over the Python manual and widen its states; about a minute on two cores.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # Silences the warning that the manual is longer than the target's context: it is split into passages
    # below.
    transformers_logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    narrow, layers = model.config.hidden_size, model.config.num_hidden_layers
    passages = -(-width // narrow)
    text = "\n\n".join(topics.values())
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
    ids = ids[: passages * PASSAGE_TOKENS].view(passages, -1)
    logger.info("running %s over %d passages of %d tokens", folder, passages, PASSAGE_TOKENS)
    with torch.inference_mode():
        states = model(ids, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
    wide = [_side_by_side(states[layer + 1], width) for layer in default_aux_ids(layers)]
    return torch.cat(wide, dim=1), _side_by_side(states[-1], width)


def make_sample(states: States, num_tokens: int, turn_tokens: int = 2048) -> Sample:
    """Return a sample of ``num_tokens`` with repeated states. Every second turn is trained."""
    aux, hidden = (_tiled(part, num_tokens) for part in states)
    positions = torch.arange(num_tokens, dtype=torch.int32)
    turn = min(turn_tokens, max(1, num_tokens // 2))
    mask = (positions // turn % 2).to(torch.uint8)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32_000, (num_tokens,), generator=generator, dtype=torch.int32)
    logsumexp = torch.randn(num_tokens, generator=generator)
    return Sample(f"bench-{num_tokens}", ids, mask, aux, hidden, ids.clone(), logsumexp)


def info_for(folder: Path, width: int) -> StoreInfo:
    """Return the info of a store of such samples."""
    config = read_config(folder)
    layers = default_aux_ids(config["num_hidden_layers"])
    return StoreInfo(f"{folder.name}, widened", "bench", "bench", width, layers, config["vocab_size"])


def _side_by_side(states: Tensor, width: int) -> Tensor:
    """Place passages side by side: [passages, tokens, h] becomes bfloat16 [tokens, width]."""
    return states.transpose(0, 1).flatten(1)[:, :width].to(torch.bfloat16).contiguous()


# ------------------------------------------------------------------------------------------------------------
# A target and a store to learn from

LAYERS, AUX_LAYERS = 8, (1, 3, 4)
HEADS, KV_HEADS = 8, 4  # of the draft: Ulysses may be 1, 2, 4 or 8
THETA = 10000.0
FOLLOWS = 0.9  # share of tokens that follow the permutation
CONFIDENCE = 8.0  # logit of the target's choice
NOISE = 0.3  # standard deviation of the noise in the aux states


@dataclass(frozen=True)
class Sizes:
    """Sizes of the target, of its draft (of the same width) and of the store."""

    hidden: int = 1024
    vocab: int = 4096
    tokens: int = 8192  # long enough for cuDNN's attention
    samples: int = 16
    ttt_steps: int = 7


@dataclass(frozen=True)
class Playground:
    """Target, store, recipes and run folders below ``root``. States are bfloat16 for every dtype of a run."""

    root: Path
    sizes: Sizes

    @property
    def target(self) -> Path:
        return self.root / f"target-{self.sizes.hidden}-{self.sizes.vocab}"

    @property
    def store(self) -> Path:
        sizes = self.sizes
        return self.root / f"store-{sizes.hidden}-{sizes.vocab}-{sizes.samples}x{sizes.tokens}"

    def make_data(self, seed: int = 0) -> None:
        """Write target and store; existing files are kept."""
        sizes, generator = self.sizes, torch.Generator().manual_seed(seed)
        embedding, head = (torch.randn(sizes.vocab, sizes.hidden, generator=generator) for _ in range(2))
        follower = torch.randperm(sizes.vocab, generator=generator)
        if not self.target.exists():
            _write_target(self.target, sizes, embedding, head)
        info = StoreInfo("made up", target_hash(self.target), "none", sizes.hidden, AUX_LAYERS, sizes.vocab)
        with StoreWriter(self.store, info) as writer:
            for number in range(sizes.samples):
                sample = _learnable_sample(number, sizes, embedding, head, follower)
                if sample.id not in writer.done_ids:
                    writer.add(sample)

    def write_recipe(self, name: str, layout: dict[str, Any], dtype: str, steps: int) -> Path:
        """Write the recipe ``root/NAME.json`` and its DeepSpeed config; return the recipe's path.

        Args:
            name: of the recipe and of its run folder.
            layout: section "parallel" of the recipe.
            dtype: that the run computes in, "bfloat16" or "float32".
            steps: optimizer steps.
        """
        deepspeed: dict[str, Any] = {"zero_optimization": {"stage": 1}}
        if dtype == "bfloat16":
            deepspeed |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        ds_json = self.root / f"ds_{dtype}.json"
        ds_json.write_text(json.dumps(deepspeed, indent=1))
        path = self.root / f"{name}.json"
        path.write_text(json.dumps(self._recipe(name, layout, steps, ds_json), indent=1))
        return path

    def _recipe(self, name: str, layout: dict[str, Any], steps: int, ds_json: Path) -> dict[str, Any]:
        hidden, vocab, ttt_steps = self.sizes.hidden, self.sizes.vocab, self.sizes.ttt_steps
        target = {"model": str(self.target), "dtype": "float32", "num_layers": LAYERS, "vocab_size": vocab}
        draft = {"intermediate_size": 2 * hidden, "vocab_size": vocab // 2, "rope_theta": THETA}
        heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": hidden // HEADS}
        steps_and_rate = {"max_steps": steps, "epochs": steps, "learning_rate": 1e-3, "warmup_ratio": 0.1}
        return {
            "name": name,
            "target": target | {"hidden_size": hidden},
            "draft": draft | heads | {"hidden_size": hidden},
            "data": {"store": str(self.store), "max_length": self.sizes.tokens},
            "parallel": layout,
            "training": {"ttt_steps": ttt_steps, **steps_and_rate},
            "deepspeed": str(ds_json),
            "output_dir": str(self.root / name),
        }


def _learnable_sample(number: int, sizes: Sizes, embedding: Tensor, head: Tensor, follower: Tensor) -> Sample:
    """Make sample ``number``. Odd samples are trained in all rows, even ones in turns that add up to half."""
    rng, generator = np.random.default_rng([1, number]), torch.Generator().manual_seed(number)
    size = sizes.tokens
    ids, follows = rng.integers(0, sizes.vocab, size), rng.random(size) < FOLLOWS
    for at in range(1, size):
        if follows[at]:
            ids[at] = follower[ids[at - 1]]
    spans = document_in_turns(size, 1.0 if number % 2 else 0.5, max(size // 8, 4)).trained_spans
    tokens = torch.from_numpy(ids)
    # The row of the head scaled by CONFIDENCE / |row|^2 gives the following token a logit of CONFIDENCE.
    aim = head[follower[tokens]]
    noise = torch.randn(size, sizes.hidden, generator=generator)
    hidden = (CONFIDENCE * aim / (aim * aim).sum(-1, keepdim=True) + noise / sizes.hidden).bfloat16()
    noises = [torch.randn(size, sizes.hidden, generator=generator) for _ in AUX_LAYERS]
    aux = torch.cat([embedding[tokens] + NOISE * noise for noise in noises], dim=-1)
    logits = hidden.float() @ head.t()
    return Sample(
        id=f"sample-{number}",
        input_ids=tokens.to(torch.int32),
        loss_mask=_mask(size, spans),
        aux_hidden_state=aux.bfloat16(),
        hidden_state=hidden,
        target_token_id=logits.argmax(-1).to(torch.int32),
        target_logsumexp=torch.logsumexp(logits, -1),
    )


def _write_target(folder: Path, sizes: Sizes, embedding: Tensor, head: Tensor) -> None:
    """Write the files of a target that training reads: config, embedding, final norm and head."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "hidden_size": sizes.hidden,
        "num_hidden_layers": LAYERS,
        "vocab_size": sizes.vocab,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": 2 * sizes.hidden,
        "rms_norm_eps": 1e-5,
        "rope_theta": THETA,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    norm = torch.ones(sizes.hidden)
    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm, "lm_head.weight": head}
    save_file(weights, folder / "model.safetensors")
