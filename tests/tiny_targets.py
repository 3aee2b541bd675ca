"""Tiny targets and tokenizers for tests: random weights, real file formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are tiny.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Llama 3: writes the BOS, trims contents, ends a turn without a line break, and 3.2 writes today's date.
LLAMA3 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: {{ strftime_now('%d %b %Y') }}\n\n<|eot_id|>"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Qwen3: an empty thinking block before the last answer only, and thinking dropped from the history.
QWEN3 = (
    "{% for message in messages %}{% set content = message.content %}{% set ns = namespace(thought='') %}"
    "{% if message.role == 'assistant' %}{% if '</think>' in content %}"
    "{% set ns.thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}"
    "{% set content = '<think>\n' + ns.thought + '\n</think>\n\n' + content %}{% endif %}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# DeepSeek: full-width bars, nothing between marker and text.
DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}"
    "{% elif message.role == 'user' %}<｜User｜>{{ message.content }}"
    "{% else %}<｜Assistant｜>{{ message.content }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
# gpt-oss: a channel after the header, the last turn ends in <|return|> and the others in <|end|>.
HARMONY = (
    "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>"
    "{% for message in messages %}<|start|>{{ message.role }}"
    "{% if message.role == 'assistant' %}<|channel|>final{% endif %}"
    "<|message|>{{ message.content }}"
    "{% if loop.last and message.role == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# Mistral: no generation prompt at all, roles must alternate.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}</s>{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for message in messages %}### {{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant: {% endif %}"
)

SPECIAL = {
    "chatml": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"]),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "qwen3": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"]),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ["<｜User｜>", "<｜Assistant｜>"]),
    "harmony": ("<|startoftext|>", "<|return|>", ["<|start|>", "<|message|>", "<|channel|>", "<|end|>"]),
    "mistral": ("<s>", "</s>", []),
    "plain": ("<s>", "</s>", []),
}
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "qwen3": QWEN3,
    "deepseek": DEEPSEEK,
    "harmony": HARMONY,
    "mistral": MISTRAL,
    "plain": PLAIN,
}


def byte_tokenizer(kind: str = "chatml", sentencepiece: bool = False) -> Any:
    """Make a fast tokenizer over bytes, with special tokens (the first ids) and template of ``kind``.

    ``sentencepiece``: puts a space before every text it is given and has a token for each ASCII character
    only.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bos, eos, others = SPECIAL[kind]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    if sentencepiece:
        letters = ["▁", *map(chr, range(32, 127)), "\n", "<unk>"]
    vocab = {token: i for i, token in enumerate([bos, eos, *others, *letters])}
    merges = [] if sentencepiece else [("a", "n"), ("an", "s"), ("Ċ", "Ċ")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>" if sentencepiece else None)
    )
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace() if sentencepiece else by_bytes
    tokenizer.decoder = decoders.Metaspace() if sentencepiece else decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (bos, eos, *others)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        extra_special_tokens=others,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATES[kind]
    return fast


def save_tiny_llama(
    folder: Path, layers: int = 8, tie: bool = False, seed: int = 0, kind: str = "chatml", **config: Any
) -> Path:
    """Save a random Llama of a few thousand parameters, H = 32, V = 280, with a byte tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 280,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tie,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **config,
    }
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    byte_tokenizer(kind).save_pretrained(folder)
    return folder
