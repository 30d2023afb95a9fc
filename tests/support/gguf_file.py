"""GGUF files written by hand: any metadata and tensors, and whole tiny Llamas as llama.cpp's converter lays them out.

Written without homodistil on purpose: the reader is held against it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

F32, F16, Q4_1, Q8_0, BF16 = 0, 1, 3, 8, 30
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "i n", "Ġ 1"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
LLAMA_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_bytes(
    metadata: Mapping[str, tuple[int, Any]],
    tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]],
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """
    Args:
        metadata: key -> (type, value); an array's value is (type of the elements, elements).
        tensors: name -> (type, shape with the slowest first, packed values).
        alignment: as in general.alignment, which is not written here.
    """
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, (kind, value) in metadata.items():
        head += _text(key) + struct.pack("<I", kind) + _value(kind, value)
    data = b""
    for name, (kind, shape, packed) in tensors.items():
        data += b"\0" * (-len(data) % alignment)
        sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += _text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, len(data))
        data += packed
    return head + b"\0" * (-len(head) % alignment) + data


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(kind: int, value: Any) -> bytes:
    if kind == 8:
        return _text(value)
    if kind == 9:
        of, items = value
        return struct.pack("<IQ", of, len(items)) + b"".join(_value(of, item) for item in items)
    return struct.pack(f"<{_SCALARS[kind]}", value)


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """Random weights; 4 heads of 8 dims on 2 keys, unless changed."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(TOKENS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "tie_word_embeddings": True,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3).add_(1.0 if "norm" in name else 0.0)
    return model


def llama_metadata(config: LlamaConfig) -> dict[str, tuple[int, Any]]:
    return {
        "general.architecture": (8, "llama"),
        "llama.block_count": (4, config.num_hidden_layers),
        "llama.context_length": (4, config.max_position_embeddings),
        "llama.embedding_length": (4, config.hidden_size),
        "llama.feed_forward_length": (4, config.intermediate_size),
        "llama.attention.head_count": (4, config.num_attention_heads),
        "llama.attention.head_count_kv": (4, config.num_key_value_heads),
        "llama.attention.key_length": (4, config.head_dim),
        "llama.attention.value_length": (4, config.head_dim),
        "llama.rope.dimension_count": (4, config.head_dim),
        "llama.rope.freq_base": (6, config.rope_parameters["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": (6, config.rms_norm_eps),
        "tokenizer.ggml.model": (8, "gpt2"),
        "tokenizer.ggml.pre": (8, "smollm"),
        "tokenizer.ggml.tokens": (9, (8, TOKENS)),
        "tokenizer.ggml.token_type": (9, (5, [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))),
        "tokenizer.ggml.merges": (9, (8, MERGES)),
        "tokenizer.ggml.bos_token_id": (4, 1),
        "tokenizer.ggml.eos_token_id": (4, 2),
        "tokenizer.ggml.padding_token_id": (4, 2),
        "tokenizer.ggml.unknown_token_id": (4, 0),
        "tokenizer.ggml.add_bos_token": (7, False),
        "tokenizer.chat_template": (8, "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"),
    }


def llama_tensors(model: LlamaForCausalLM) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    """All parameters as F32, rows of queries and keys in llama.cpp's order."""
    config, weights = model.config, {name: p.detach().numpy() for name, p in model.named_parameters()}
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for ours, theirs in LLAMA_LAYER.items()}
    tensors = {}
    for name, values in weights.items():
        stored = names[name.removesuffix(".weight")]
        if stored.endswith(("attn_q", "attn_k")):
            values = rows_of_llama_cpp(values, config.head_dim)
        tensors[f"{stored}.weight"] = (F32, values.shape, values.tobytes())
    return tensors


def rows_of_llama_cpp(matrix: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows i and i + H/2 of each head become neighbours."""
    order = []
    for first in range(0, len(matrix), head_dim):
        for i in range(head_dim // 2):
            order += [first + i, first + i + head_dim // 2]
    return matrix[order]


def write_llama(
    path: Path,
    model: LlamaForCausalLM,
    metadata: Mapping[str, tuple[int, Any] | None] | None = None,
    tensors: Mapping[str, tuple[int, tuple[int, ...], bytes] | None] | None = None,
) -> Path:
    """A whole model in a file, with entries changed, added or (None) left out."""
    entries = llama_metadata(model.config) | dict(metadata or {})
    table = llama_tensors(model) | dict(tensors or {})
    kept = [{name: value for name, value in one.items() if value is not None} for one in (entries, table)]
    path.write_bytes(gguf_bytes(*kept))
    return path


def floats(values: list[float], shape: tuple[int, ...] | None = None) -> tuple[int, tuple[int, ...], bytes]:
    """A tensor of F32."""
    packed = np.asarray(values, np.float32)
    assert shape is None or math.prod(shape) == packed.size
    return F32, shape or packed.shape, packed.tobytes()
