"""Write a draft as the folder that SGLang and vLLM serve, and prove it by reading it back.

The folder appears under its name only after an independent reader (``served_check.py``) has computed the same logits from
it as the training model does, and no tensor in it was left unread.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eagle_ds.config.outputs import check_output_folder
from eagle_ds.drafts.cached import CachedDraft
from eagle_ds.drafts.folder import DraftOnDisk, load_served_draft
from eagle_ds.drafts.served import ServeCommands, served_config, served_name
from eagle_ds.drafts.served_check import Probe, ServedReader
from eagle_ds.target.info import TargetInfo

log = logging.getLogger(__name__)

WRITER = {"format": "pt", "writer": "eagle_ds"}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOLERANCE = 2e-3  # relative, float32 against float32 over angles of a few thousand; a wrong name or key gives about 1


@dataclass(frozen=True)
class ExportSettings:
    """What the exported folder says beside the draft itself. ``layers``: outputs of the target's layers that it reads."""

    target: str
    layers: Sequence[int]
    info: TargetInfo | None = None
    dtype: str = "bfloat16"
    vllm: bool = False
    num_steps: int = 3


def export_draft(draft: DraftOnDisk, out: str | Path, settings: ExportSettings) -> Path:
    """Write ``draft`` to the folder ``out``, verified, under a temporary name first. An earlier export there is replaced.

    Raises ValueError, one sentence, where the draft cannot be served as it is, or ``out`` holds something else.
    """
    out = Path(out)
    _check_servable(draft, settings)
    _check_replaceable(out)
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
            raise ValueError(f"the disk of {out.parent} is full; the draft needs {_bytes(draft, settings) / 1e9:.2f} GB there") from failure
        raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    log.info("wrote %s: logits read back from it differ by %.1e (relative)", out, error)
    return out


def _check_servable(draft: DraftOnDisk, settings: ExportSettings) -> None:
    arch = draft.arch
    if settings.dtype not in DTYPES:
        raise ValueError(f"dtype {settings.dtype} is not one of {', '.join(DTYPES)}")
    if len(settings.layers) != arch.num_aux:
        raise ValueError(f"the draft reads {arch.num_aux} target layers, but {list(settings.layers)} names {len(settings.layers)}")
    if draft.layer_outputs and tuple(draft.layer_outputs) != tuple(settings.layers):
        raise ValueError(f"the draft was trained on layers {list(draft.layer_outputs)}, not on {list(settings.layers)}; leave the layers out")
    if arch.hidden_size % arch.num_attention_heads:
        raise ValueError(
            f"engines read config.json with transformers, which refuses a draft whose hidden_size {arch.hidden_size} is no multiple of its "
            f"{arch.num_attention_heads} heads; train with another number of heads"
        )
    if arch.attention_bias and not settings.vllm:
        raise ValueError("SGLang drops attention biases without a word; export with --vllm, or train with draft.attention_bias false")
    if settings.info:
        for name, stated in (("hidden_size", arch.target_hidden_size), ("vocab_size", arch.target_vocab_size)):
            if getattr(settings.info, name) != stated:
                raise ValueError(f"target {settings.target} has {name} {getattr(settings.info, name)}, but the draft was made for {stated}")


def _check_replaceable(out: Path) -> None:
    """Nothing there, an empty folder, or an earlier export of ours."""
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
    tensors = served_tensors(draft, DTYPES[settings.dtype])
    save_file(tensors, folder / "model.safetensors", metadata=WRITER)
    config = served_config(draft.arch, settings.layers, settings.info, settings.dtype, settings.vllm)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_read_me(draft, settings, out), encoding="utf-8")
    for path in folder.iterdir():
        os.chmod(path, 0o644)
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())


def served_tensors(draft: DraftOnDisk, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything that goes into model.safetensors, by served name."""
    tensors = {served_name(name): tensor.to(dtype).contiguous() for name, tensor in draft.state.items()}
    return tensors | {"d2t": draft.vocab.d2t.to(torch.int64).contiguous(), "t2d": draft.vocab.t2d.to(torch.bool).contiguous()}


def _read_me(draft: DraftOnDisk, settings: ExportSettings, out: Path) -> str:
    commands = ServeCommands(settings.target, out, settings.num_steps, draft.arch.sliding_window)
    engine, command = ("vLLM", commands.vllm) if settings.vllm else ("SGLang", commands.sglang)
    return (
        f"# EAGLE-3 draft for {settings.target}\n\n"
        f"Trained on up to {draft.arch.max_position_embeddings} tokens; reads the outputs of target layers {list(settings.layers)}; proposes "
        f"{draft.arch.draft_vocab_size} of {draft.arch.target_vocab_size} tokens.\n\nServe it with {engine}:\n\n```bash\n{command}\n```\n"
    )


def verify_export(draft: DraftOnDisk, folder: Path, dtype: torch.dtype) -> float:
    """Relative difference of the logits that the folder gives from the training model's, at every row and a drafting step.

    Raises ValueError if it is not float32 noise, or if engines would leave a tensor of the folder unread.
    """
    state, arch, vocab = load_served_draft(folder)
    reader = ServedReader(folder)
    spread = 1 if arch.sliding_window else min(arch.max_position_embeddings, 4096)
    probe = Probe.random(arch.num_aux * arch.target_hidden_size, arch.hidden_size, spread)
    expected, found = training_logits(draft, probe, dtype), reader.logits(probe)
    error = float((found - expected).norm() / expected.norm())
    embedding = {"embed_tokens.weight"} if arch.trains_embedding else set()  # engines read it; the probe brings its own
    unused = reader.unused() - embedding - {"d2t"}
    if unused:
        raise ValueError(f"{folder}: engines would not read {', '.join(sorted(unused))}")
    if not torch.equal(reader.token_ids(), draft.vocab.target_ids) or not torch.equal(vocab.t2d, draft.vocab.t2d):
        raise ValueError(f"{folder}: the vocabulary map read back is not the draft's")
    if arch.trains_embedding and not torch.equal(state["embed_tokens.weight"], draft.state["embed_tokens.weight"].to(dtype).float()):
        raise ValueError(f"{folder}: the embedding read back is not the draft's")
    if not error < TOLERANCE:
        raise ValueError(f"{folder}: logits read back differ by {error:.2e} from the training model's, where {TOLERANCE:.0e} is rounding")
    return error


@torch.inference_mode()
def training_logits(draft: DraftOnDisk, probe: Probe, dtype: torch.dtype) -> Tensor:
    """[S + 1, Vd]: what the training model says to the probe, in float32 with weights rounded to ``dtype``."""
    rounded = {name: tensor.to(dtype) for name, tensor in draft.state.items()}
    unused_embedding = torch.zeros(1, draft.arch.hidden_size)
    cached = CachedDraft(DraftOnDisk(rounded, draft.arch, draft.vocab, draft.folder).build(unused_embedding, torch.float32), draft.vocab)
    logits = []
    for row in range(len(probe.positions)):
        one = slice(row, row + 1)
        cached.extend_embedded(probe.aux[one], probe.embedded[one], probe.positions[one])
        row_logits, handed_on = cached.step(0, cached.state, None)
        logits.append(row_logits)
    logits.append(cached.step(1, handed_on, probe.embedded[-1:])[0])
    return torch.cat(logits)


def _put_in_place(temp: Path, out: Path) -> None:
    """Rename into place; an earlier export steps aside first and is removed last."""
    if not out.exists():
        os.rename(temp, out)
        return
    aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old."))
    os.rename(out, aside / out.name)
    os.rename(temp, out)
    shutil.rmtree(aside, ignore_errors=True)


def _bytes(draft: DraftOnDisk, settings: ExportSettings) -> int:
    return sum(tensor.numel() for tensor in draft.state.values()) * DTYPES[settings.dtype].itemsize
