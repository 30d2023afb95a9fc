"""What a family reads from a configuration: the sizes of a model, and values that it has to have."""

from __future__ import annotations

from typing import Any, NamedTuple


class ModelShape(NamedTuple):
    """The sizes of a model, read from its configuration (Hugging Face's names)."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_tokens: int
    """Longest sequence that the position embeddings hold."""


class RequiredValue(NamedTuple):
    """What a field of a family's configuration has to be; absent, it is."""

    allowed: tuple[Any, ...]
    reason: str
    """Why, and what to do: the end of a message."""
