"""Export a draft to the folder that SGLang and vLLM serve, and verify it by reading it back.

The folder is written under a temporary name. It gets its final name only after an independent reader
(``independent_reader.py``) has computed the same logits from it as the training model and has read every
tensor.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eagle_ds.config.outputs import check_output_folder
from eagle_ds.drafts.cached_draft import CachedDraft
from eagle_ds.drafts.independent_reader import Probe, ServedReader
from eagle_ds.drafts.loading import DraftOnDisk, load_served_draft
from eagle_ds.drafts.serve_commands import ServeCommands
from eagle_ds.drafts.serving_format import (
    EMBEDDING,
    OWN_KEY,
    length_keys,
    served_config,
    served_name,
    sglang_obstacles,
)
from eagle_ds.target.info import TargetInfo, check_aux_ids

logger = logging.getLogger(__name__)

WRITER = {"format": "pt", "writer": "eagle_ds"}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Relative difference allowed between two float32 computations with rope angles of a few thousand. A wrong
# name or key gives about 1.
TOLERANCE = 2e-3


@dataclass(frozen=True)
class ExportSettings:
    """What the exported folder says in addition to the draft itself.

    Attributes:
        layers: target layers whose outputs the draft reads.
        info: the target's sizes and context length, if its config.json is at hand.
        vllm: the draft is for vLLM alone. Its architecture then has vLLM's own name, which SGLang refuses.
        num_steps: draft tokens in the serving commands of its README.
        tokenizer_hash: of the target's tokenizer, for tools that serve the folder; None: not at hand.
    """

    target: str
    layers: Sequence[int]
    info: TargetInfo | None = None
    dtype: str = "bfloat16"
    vllm: bool = False
    num_steps: int = 3
    tokenizer_hash: str | None = None


def export_draft(draft: DraftOnDisk, out: str | Path, settings: ExportSettings) -> Path:
    """Write ``draft`` to the folder ``out`` and verify it. An earlier export there is replaced.

    Raises ValueError, one sentence, if engines cannot serve the draft, or if ``out`` holds something else.
    """
    out = Path(out)
    _check_servable(draft, settings)
    _check_replaceable(out)
    if settings.info is None and settings.layers[0] != 1:
        logger.warning(
            "the target's config.json is not at hand; for a target of SGLang's DeepSeek class, SGLang would "
            "read layers that are one off from %s: export again where the target is", list(settings.layers),
        )
    check_output_folder(out.parent, "the draft's folder, in")
    out.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        _write(draft, temp, settings, out)
        error = verify_export(draft, temp, DTYPES[settings.dtype])
        os.chmod(temp, 0o755)
        _put_in_place(temp, out)
    except OSError as failure:
        if failure.errno == errno.ENOSPC:
            count = sum(tensor.numel() for tensor in draft.state.values())
            needed = f"the draft needs {count * DTYPES[settings.dtype].itemsize / 1e9:.2f} GB there"
            raise ValueError(f"the disk of {out.parent} is full; {needed}") from failure
        raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    logger.info("wrote %s and verified it: its logits differ by %.1e (relative)", out, error)
    logger.info("Trained on up to %d tokens. %s", draft.arch.trained_length, length_note(draft, settings))
    return out


def _check_servable(draft: DraftOnDisk, settings: ExportSettings) -> None:
    """Raise ValueError if an engine would refuse the draft or read it wrongly."""
    arch, layers, trained = draft.arch, list(settings.layers), list(draft.layer_outputs or ())
    if settings.dtype not in DTYPES:
        raise ValueError(f"dtype {settings.dtype} is not one of {', '.join(DTYPES)}")
    if len(layers) != arch.num_aux:
        raise ValueError(f"the draft reads {arch.num_aux} target layers, but {layers} names {len(layers)}")
    if trained and trained != layers:
        wrong = f"the draft was trained on layers {trained}, not on {layers}"
        raise ValueError(f"{wrong}; leave --aux-layer-ids out")
    if arch.hidden_size % arch.num_attention_heads:
        raise ValueError(
            "engines read config.json with transformers, which refuses a draft whose hidden_size "
            f"{arch.hidden_size} is no multiple of its {arch.num_attention_heads} heads; train with another"
        )
    if settings.info:
        draft.check_target(settings.info, settings.target)
        check_aux_ids(layers, settings.info.num_layers)
    obstacles = sglang_obstacles(arch, layers, settings.info)
    if obstacles and not settings.vllm:
        raise ValueError(
            f"{'; '.join(obstacles)}, without a warning; export with --vllm and serve with vLLM, or train "
            "without it"
        )
    if takes_no_map(draft) and not torch.equal(draft.vocab.target_ids, torch.arange(arch.target_vocab_size)):
        raise ValueError(
            "the draft has the target's whole vocabulary in another order; vLLM takes no d2t then, so its "
            "lm_head must have the target's order"
        )


def takes_no_map(draft: DraftOnDisk) -> bool:
    """Whether d2t is left out: vLLM has a place for it only where the vocabularies differ in size."""
    return draft.arch.draft_vocab_size == draft.arch.target_vocab_size


def _check_replaceable(out: Path) -> None:
    """Raise ValueError unless ``out`` is absent, an empty folder, or an earlier export of this project."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        with safe_open(out / "model.safetensors", framework="pt") as archive:
            ours = (archive.metadata() or {}).get("writer") == WRITER["writer"]
    except (OSError, SafetensorError):
        ours = False
    if not ours:
        raise ValueError(f"{out} exists and is no export of this tool; give another --out, or remove it")


def _write(draft: DraftOnDisk, folder: Path, settings: ExportSettings, out: Path) -> None:
    dtype = DTYPES[settings.dtype]
    tensors = {served_name(name): tensor.to(dtype).contiguous() for name, tensor in draft.state.items()}
    if not takes_no_map(draft):
        tensors |= {"d2t": draft.vocab.d2t.contiguous(), "t2d": draft.vocab.t2d.contiguous()}
    save_file(tensors, folder / "model.safetensors", metadata=WRITER)
    config = served_config(draft.arch, settings.layers, settings.info, settings.dtype, settings.vllm)
    config[OWN_KEY]["tokenizer_hash"] = settings.tokenizer_hash
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_read_me(draft, settings, folder, out), encoding="utf-8")
    # A served folder must be readable by all; fsync writes the data to disk before the folder is renamed.
    for path in folder.iterdir():
        os.chmod(path, 0o644)
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())


def _read_me(draft: DraftOnDisk, settings: ExportSettings, folder: Path, out: Path) -> str:
    commands = replace(ServeCommands.for_folder(settings.target, folder, settings.num_steps), draft=out)
    blocks = [f"vLLM:\n\n```bash\n{commands.vllm}\n```\n"]
    if not settings.vllm:
        blocks.insert(0, f"SGLang:\n\n```bash\n{commands.sglang}\n```\n")
    return f"""\
# EAGLE-3 draft for {settings.target}

This draft model speeds up its target by speculative decoding. It reads the target's hidden states, so it
is served together with the target.

- Trained on sequences of up to {draft.arch.trained_length} tokens. {length_note(draft, settings)}
- Reads the outputs of target layers {list(settings.layers)} (numbered from 0).
- Proposes {draft.arch.draft_vocab_size} of the target's {draft.arch.target_vocab_size} tokens.

Serve both with {chr(10).join(blocks)}"""


def length_note(draft: DraftOnDisk, settings: ExportSettings) -> str:
    """Say up to which length engines serve the draft, and what to expect beyond the trained length."""
    arch, info = draft.arch, settings.info
    keys = length_keys(arch, info)
    served, flag = keys["max_position_embeddings"], keys[OWN_KEY]["context_length"]
    if flag and info and info.longest_context:
        cause = f"Its YaRN angles end at {served} tokens, so the target is served up to that length only"
    elif flag:
        cause = f"The target's context is not known, so the command serves {served} tokens"
    else:
        cause = f"Engines serve it up to the target's context, {served} tokens"
    if served <= arch.trained_length:
        return f"{cause}."
    if arch.sliding_window:
        return f"{cause}. Its window of {arch.sliding_window} keys holds most of the acceptance there."
    return (
        f"{cause}. Expect the acceptance length to fall towards 1 beyond {arch.trained_length} tokens: "
        "another project measured 2.30 at 2K tokens and 1.09 at 16K for a draft that was trained short. To "
        "keep it, train with a larger data.max_length or with draft.sliding_window."
    )


def verify_export(draft: DraftOnDisk, folder: Path, dtype: torch.dtype) -> float:
    """Compare the logits that engines compute from the folder with the training model's, on random inputs.

    Also compares the vocabulary map and, if the draft has its own, the embedding.

    Returns:
        The relative difference of the logits.

    Raises:
        ValueError: the difference is more than float32 rounding, or engines would not read some tensor of the
            folder.
    """
    read, reader = load_served_draft(folder), ServedReader(folder)
    arch = read.arch
    spread = 1 if arch.sliding_window else min(arch.trained_length, 4096)
    probe = Probe.random(arch.num_aux * arch.target_hidden_size, arch.hidden_size, spread)
    expected, found = training_logits(draft, probe, dtype), reader.logits(probe)
    error = float((found - expected).norm() / expected.norm())
    same_ids = torch.equal(reader.token_ids(), draft.vocab.target_ids)
    # Engines read the draft's own embedding. The reader does not: the probe holds embedded tokens.
    embedding = {EMBEDDING} if arch.trains_embedding else set()
    if unread := reader.unused() - embedding:
        raise ValueError(f"{folder}: engines would not read {', '.join(sorted(unread))}")
    if not same_ids or not torch.equal(read.vocab.t2d, draft.vocab.t2d):
        raise ValueError(f"{folder}: the vocabulary map read back is not the draft's")
    if embedding and not torch.equal(read.state[EMBEDDING], draft.state[EMBEDDING].to(dtype).float()):
        raise ValueError(f"{folder}: the embedding read back is not the draft's")
    if not error < TOLERANCE:
        limit = f"rounding explains at most {TOLERANCE:.0e}"
        raise ValueError(f"{folder}: its logits differ by {error:.2e} from the training model's; {limit}")
    return error


@torch.inference_mode()
def training_logits(draft: DraftOnDisk, probe: Probe, dtype: torch.dtype) -> Tensor:
    """Return the training model's logits [S + 1, Vd] for the probe.

    Computes in float32 with weights rounded to ``dtype``, as they are in the file.
    """
    rounded = {name: tensor.to(dtype) for name, tensor in draft.state.items()}
    no_embedding = torch.zeros(1, draft.arch.hidden_size)  # never read: the probe holds embedded tokens
    model = replace(draft, state=rounded).build(no_embedding, torch.float32)
    cached = CachedDraft(model, draft.vocab)
    logits = []
    for row in range(len(probe.positions)):
        one = slice(row, row + 1)
        cached.extend_embedded(probe.aux[one], probe.embedded[one], probe.positions[one])
        row_logits, next_state = cached.step(0, cached.state, None)
        logits.append(row_logits)
    logits.append(cached.step(1, next_state, probe.embedded[-1:])[0])
    return torch.cat(logits)


def _put_in_place(temp: Path, out: Path) -> None:
    """Rename ``temp`` to ``out``. An earlier export is moved away first and removed at the end."""
    if not out.exists():
        os.rename(temp, out)
        return
    aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old."))
    os.rename(out, aside / out.name)
    os.rename(temp, out)
    shutil.rmtree(aside, ignore_errors=True)
