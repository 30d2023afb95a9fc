"""Llama and the models of its block: SmolLM2 and Llama 3 (model_type llama), SmolLM3, Mistral, Ministral, Qwen2, Qwen3.

Qwen2 has biases at queries, keys and values; SmolLM3 layers without positions; Qwen3 norms of every head's queries and
keys, which are as wide as a head.
"""

from __future__ import annotations

from homodistil.models.decoders.pre_norm import LLAMA_LIKE, PreNormDecoder

LLAMA = PreNormDecoder(
    name="llama", model_types=("llama", "smollm3", "mistral", "ministral", "qwen2"), narrows_heads=True
)
QWEN3 = PreNormDecoder(
    name="qwen3",
    model_types=("qwen3",),
    architecture=LLAMA_LIKE._replace(has_head_norms=True),
    narrows_heads=True,
)
