"""The second contract of a family, beside family.py: its blocks, for compensation to refit (pruning/compensation)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn


class LayerParts(NamedTuple):
    """One layer as residual blocks: `attend`, then `attention_output`; `ffn`, then `ffn_output`; and what is in these.

    Each output block is LayerNorm(linear(input) + residual), dropout aside.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_linear: nn.Linear
    attention_output: Callable[[Tensor, Tensor], Tensor]
    """(heads side by side, residual) -> residual stream after attention."""
    attention_norm: nn.LayerNorm
    ffn_linear: nn.Linear
    ffn: Callable[[Tensor], Tensor]
    """Residual stream -> activated neurons."""
    ffn_output_linear: nn.Linear
    ffn_output: Callable[[Tensor, Tensor], Tensor]
    """(activated neurons, residual) -> residual stream after the layer."""
    ffn_norm: nn.LayerNorm


class HeadParts(NamedTuple):
    """The MLM head before the decoder: LayerNorm(activation(linear(hidden)))."""

    linear: nn.Linear
    activation: Callable[[Tensor], Tensor]
    norm: nn.LayerNorm


class Compensable(ABC):
    """What compensation refits (pruning/compensation): a family that has it can be cut with refit or full."""

    refit_condition: str | None = ""
    """Which of its models (`refit_obstacle`), in words: empty, all; None, not one."""

    @abstractmethod
    def attend(self, model: nn.Module, i: int, hidden: Tensor, seen: Tensor | None) -> Tensor:
        """Attention of layer `i` before its output projection: (B, T, hidden) -> (B, T, heads x dims of a head).

        Args:
            seen: bool, (B, 1, 1 or T, T), True = looked at; None: everything is. For SDPA, as `layers` take it.
        """

    @abstractmethod
    def layer_parts(self, model: nn.Module) -> list[LayerParts]:
        """The parts of every layer."""

    @abstractmethod
    def head_parts(self, model: nn.Module) -> HeadParts:
        """The parts of `lm_transform`."""

    @abstractmethod
    def embedding_norm(self, model: nn.Module) -> nn.LayerNorm:
        """The LayerNorm that ends the embeddings."""
