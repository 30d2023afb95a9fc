"""Llama and the models of its block: SmolLM2 and Llama 3 (model_type llama), Mistral, Qwen2 and Qwen3.

Qwen2 has biases at queries, keys and values; Qwen3 norms of every head's queries and keys, which stay whole.
"""

from __future__ import annotations

from homodistil.models.decoders.pre_norm import PreNormDecoder

LLAMA = PreNormDecoder(name="llama", model_types=("llama", "mistral", "qwen2", "qwen3"))
