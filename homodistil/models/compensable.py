"""The second contract of a family, beside family.py: its residual blocks, for compensation (pruning/compensation)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from homodistil.models.norms import Norm


class Block(NamedTuple):
    """One residual block, dropout aside: y = x + output_norm(output(inner(input_norm(x)))), and then stream_norm(y).

    A norm that a model does not have is None. Post-norm models (BERT) have stream norms, pre-norm ones input norms;
    some have output norms as well (Gemma 3) or instead (OLMo 2).
    """

    input_norm: Norm | None
    inputs: tuple[nn.Module, ...]
    """The linears (`nn.Linear` or Conv1D) that read what the input norm puts out."""
    output: nn.Module
    """The linear that adds to the residual stream."""
    output_norm: Norm | None
    stream_norm: Norm | None
    inner: nn.Module | None = None
    """What turns input_norm(x) into what `output` reads, as its result or inside it; None: only the whole layer can
    run it, as attention wants masks and positions."""

    @property
    def entry(self) -> nn.Module:
        """The first module that is given x."""
        return self.input_norm.module if self.input_norm is not None else self.inputs[0]


class HeadLinears(NamedTuple):
    """The linears of one attention block whose heads may be rotated: each with a head of its own for every other's."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module


class HeadParts(NamedTuple):
    """The vocabulary head before the decoder: norm(activation(linear(hidden)))."""

    linear: nn.Module
    activation: Callable[[Tensor], Tensor]
    norm: Norm


class Compensable(ABC):
    """What compensation walks through: a family that has it can be cut with refit or full."""

    refit_condition: str | None = ""
    """Which of its models (`refit_obstacle`), in words: empty, all; None, not one."""
    gain_offset: float = 0.0
    """See `Norm.offset`: of all norms of the family."""

    @abstractmethod
    def blocks(self, model: nn.Module, i: int) -> tuple[Block, Block]:
        """The attention block and the feed-forward block of layer `i`, in this order."""

    @abstractmethod
    def embedding_norm(self, model: nn.Module) -> Norm | None:
        """The norm that ends the embeddings, if one does."""

    def rotation_is_exact(self, model: nn.Module) -> bool:
        """Whether the residual stream can be rotated without any change: where all gains of norms can be folded into
        linears behind them. (Those of a tied decoder aside, see pruning/compensation/uneven_gains.py.)"""
        return all(
            block.output_norm is None and block.stream_norm is None
            for i in range(len(self.layers(model)))
            for block in self.blocks(model, i)
        )

    def head_linears(self, model: nn.Module, i: int) -> HeadLinears | None:
        """What is rotated with the heads of layer `i`; None: their dims are selected (rotary positions turn them in
        pairs, which a rotation would mix)."""
        return None

    def head_parts(self, model: nn.Module) -> HeadParts | None:
        """The parts of `lm_transform`; None: the decoder reads what the backbone puts out."""
        return None

    def norm(self, module: nn.Module | None) -> Norm | None:
        """`module`, if it is a norm at all: a layer may have a placeholder in its place."""
        has_weight = getattr(module, "weight", None) is not None
        return Norm(module, self.gain_offset) if has_weight else None
