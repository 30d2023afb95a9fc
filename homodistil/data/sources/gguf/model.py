"""Configuration and weights of a Llama out of a GGUF file, as Hugging Face's class has them.

llama.cpp has the rows of queries and keys in another order: it rotates neighbours (2i, 2i + 1) of a head's H dims where
Hugging Face rotates (i, i + H/2), so row h H + 2i + j of a file is row h H + j H/2 + i here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from transformers import LlamaConfig

from homodistil.data.sources.gguf import metadata
from homodistil.data.sources.gguf.container import GgufFile
from homodistil.errors import UserError
from homodistil.models.checkpoint_files import short

ARCHITECTURE = "llama"
_MAX_LAYERS = 1024
_MAX_SHOWN = 3
_EMBEDDINGS, _HEAD = "token_embd.weight", "output.weight"
_LAYER = {
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


class Source(NamedTuple):
    """Where a parameter lies in the file."""

    name: str
    shape: tuple[int, ...]
    heads: int | None = None
    """Heads whose rows are in llama.cpp's order; None: rows as they are."""


def read_config(file: GgufFile) -> LlamaConfig:
    """The model's configuration. Raises `UserError`: another architecture, or sizes that no stock Llama can have."""
    _check_architecture(file)
    return LlamaConfig(
        **_sizes(file),
        vocab_size=_vocabulary(file),
        max_position_embeddings=metadata.integer(file, "llama.context_length"),
        rms_norm_eps=metadata.positive(file, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": metadata.positive(file, "llama.rope.freq_base", default=10000.0),
        },
        tie_word_embeddings=_HEAD not in file.tensors,
        bos_token_id=token_id(file, "bos"),
        eos_token_id=token_id(file, "eos"),
        pad_token_id=token_id(file, "padding"),
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


def token_id(file: GgufFile, name: str) -> int | None:
    """Id of a special token (bos, eos, padding, unknown), None where the file names none."""
    last = len(metadata.texts(file, "tokenizer.ggml.tokens")) - 1
    return metadata.integer(file, f"tokenizer.ggml.{name}_token_id", default=None, low=0, high=last)


def sources(file: GgufFile, config: LlamaConfig) -> dict[str, Source]:
    """Where each parameter of the model lies: Hugging Face's name -> source.

    Raises:
        UserError: one is missing or has another shape than the metadata say, or there are tensors that no stock Llama
            has (experts, biases, scaled rotary frequencies).
    """
    wanted = dict(_parameters(config))
    names = {source.name for source in wanted.values()}
    if missing := [name for name in names if name not in file.tensors]:
        raise UserError(f"{file.where}: has no {_some(missing)}; give a file with a whole model, not a part")
    if unknown := [name for name in file.tensors if name not in names]:
        raise UserError(
            f"{file.where}: has {_some(unknown)}, which a stock Llama has not (experts, biases, rotary frequencies of "
            f"their own); give a file of a plain Llama, or the model's Hugging Face folder"
        )
    for source in wanted.values():
        if (shape := file.tensors[source.name].shape) != source.shape:
            raise UserError(
                f"{file.where}: tensor {source.name} has shape {list(shape)}, by the metadata it is "
                f"{list(source.shape)}; convert the model again"
            )
    return wanted


def parameter(file: GgufFile, source: Source) -> np.ndarray:
    """Its values (float32), with rows in Hugging Face's order."""
    values = file.tensor(source.name)
    if source.heads is None:
        return values
    pairs = values.reshape(source.heads, -1, 2, values.shape[-1])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _check_architecture(file: GgufFile) -> None:
    if (kind := metadata.text(file, "general.architecture")) != ARCHITECTURE:
        raise UserError(
            f"{file.where}: found general.architecture {short(repr(kind))}, allowed is {ARCHITECTURE}; give the "
            f"model's Hugging Face folder instead"
        )
    scaling = metadata.text(file, "llama.rope.scaling.type", default="none")
    if scaling != "none" or metadata.positive(file, "llama.rope.scale_linear", default=1.0) != 1.0:
        raise UserError(
            f"{file.where}: found rotary positions that are scaled (llama.rope.scaling.type {short(repr(scaling))}), "
            f"allowed is none; give the model's Hugging Face folder instead"
        )


def _vocabulary(file: GgufFile) -> int:
    """Rows of the embeddings, of which the last may belong to no token."""
    if _EMBEDDINGS not in file.tensors or len(file.tensors[_EMBEDDINGS].shape) != 2:
        raise UserError(f"{file.where}: has no matrix {_EMBEDDINGS}; give a file with a whole model, not a part")
    rows, tokens = file.tensors[_EMBEDDINGS].shape[0], len(metadata.texts(file, "tokenizer.ggml.tokens"))
    if tokens > rows:
        raise UserError(f"{file.where}: has {tokens} tokens for {rows} rows of {_EMBEDDINGS}; convert the model again")
    return rows


def _sizes(file: GgufFile) -> dict[str, int]:
    hidden = metadata.integer(file, "llama.embedding_length")
    heads = metadata.integer(file, "llama.attention.head_count")
    kv_heads = metadata.integer(file, "llama.attention.head_count_kv", default=heads)
    head_dim = metadata.integer(file, "llama.attention.key_length", default=hidden // heads)
    value_dim = metadata.integer(file, "llama.attention.value_length", default=head_dim)
    rotated = metadata.integer(file, "llama.rope.dimension_count", default=head_dim)
    if hidden % heads or heads % kv_heads or head_dim % 2 or value_dim != head_dim or rotated != head_dim:
        raise UserError(
            f"{file.where}: found hidden size {hidden}, {heads} heads on {kv_heads} keys of {head_dim} dims "
            f"({rotated} rotated) and values of {value_dim}; a stock Llama has a hidden size that its heads divide, "
            f"whole groups of heads, and one even number of dims, all rotated; give the model's Hugging Face folder"
        )
    return {
        "hidden_size": hidden,
        "intermediate_size": metadata.integer(file, "llama.feed_forward_length"),
        "num_hidden_layers": metadata.integer(file, "llama.block_count", high=_MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


def _parameters(config: LlamaConfig) -> Iterator[tuple[str, Source]]:
    hidden, words = config.hidden_size, config.vocab_size
    yield "model.embed_tokens.weight", Source(_EMBEDDINGS, (words, hidden))
    yield "model.norm.weight", Source("output_norm.weight", (hidden,))
    if not config.tie_word_embeddings:
        yield "lm_head.weight", Source(_HEAD, (words, hidden))
    shapes = _layer_shapes(config)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for i in range(config.num_hidden_layers):
        for name, ours in _LAYER.items():
            source = Source(f"blk.{i}.{name}.weight", shapes[name], heads.get(name))
            yield f"model.layers.{i}.{ours}.weight", source


def _layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "attn_norm": (hidden,),
        "attn_q": (query, hidden),
        "attn_k": (key, hidden),
        "attn_v": (key, hidden),
        "attn_output": (hidden, query),
        "ffn_norm": (hidden,),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }


def _some(names: list[str]) -> str:
    shown, rest = [short(repr(name)) for name in sorted(names)[:_MAX_SHOWN]], len(names) - _MAX_SHOWN
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
