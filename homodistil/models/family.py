"""The contract of a model family: the interface between stock Hugging Face classes and everything else.

Nothing outside `models/` knows a family's parameter names, the order of its blocks, or what a stock configuration can
hold. A family is an object of a class that implements this contract: `named_family.py` has what follows from dotted
names alone; encoders with LayerNorm after each block share `encoders/post_norm.py`, decoders with a norm before each
block `decoders/pre_norm.py`, and differ in data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PretrainedConfig

from homodistil.models.architecture import BERT_LIKE, Architecture
from homodistil.models.axes import AxisTable, Widths


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


class LayerParts(NamedTuple):
    """One layer as residual blocks: `attend`, then `attention_output`; `ffn`, then `ffn_output`; and what is in these.

    Each output block is LayerNorm(linear(input) + residual), dropout aside.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_linear: nn.Linear
    attention_output: nn.Module
    """(heads side by side, residual) -> residual stream after attention."""
    attention_norm: nn.LayerNorm
    ffn_linear: nn.Linear
    ffn: nn.Module
    """Residual stream -> activated neurons."""
    ffn_output_linear: nn.Linear
    ffn_output: nn.Module
    """(activated neurons, residual) -> residual stream after the layer."""
    ffn_norm: nn.LayerNorm


class HeadParts(NamedTuple):
    """The MLM head before the decoder: LayerNorm(activation(linear(hidden)))."""

    linear: nn.Linear
    activation: Callable[[Tensor], Tensor]
    norm: nn.LayerNorm


class ModelFamily(ABC):
    """Stock models of one architecture. Every method takes a model of the family or its configuration."""

    name: str
    """For messages and the tag of a model card: "bert"."""
    model_types: tuple[str, ...]
    """Hugging Face's `model_type` of all configurations that this family describes."""
    auto_class: str
    """Name of the `transformers` class that loads an exported checkpoint."""
    pipeline_tag: str
    """The pipeline tag of a checkpoint on the hub: "fill-mask"."""
    forward_options: Mapping[str, Any] = {}
    """Arguments of every call of the backbone, beside token ids and padding mask."""

    architecture: Architecture = BERT_LIKE
    """What FLOPs and bytes depend on beside widths."""

    @property
    def is_causal(self) -> bool:
        """Whether a position sees itself and earlier ones only."""
        return self.architecture.is_causal

    @property
    def task(self) -> str:
        """What the language-modelling head predicts, by its name in data/task.py: masked tokens or the next one."""
        return "causal" if self.is_causal else "mlm"

    # --- configurations

    @abstractmethod
    def shape(self, config: PretrainedConfig) -> ModelShape:
        """The architecture that `config` describes."""

    @abstractmethod
    def set_dropout(self, config: PretrainedConfig, probability: float) -> None:
        """Set every dropout probability of `config`, in place."""

    @abstractmethod
    def student_config(self, teacher: PretrainedConfig, widths: Widths) -> PretrainedConfig:
        """Stock configuration with these widths, alike in all layers, and their layers; the rest as in `teacher`."""

    @abstractmethod
    def stock_head_dim(self, widths: Widths) -> int | None:
        """Head size of the stock configuration that can hold these widths; None when none can."""

    @abstractmethod
    def empty_model(self, config: PretrainedConfig) -> nn.Module:
        """A freshly initialised model of this shape (put it on the meta device to look at shapes only)."""

    # --- what shrinks

    @abstractmethod
    def axis_table(self, model: nn.Module) -> AxisTable:
        """Axes and uses of `model` at its current widths (tied parameters appear once, under their first name)."""

    @abstractmethod
    def refresh(self, model: nn.Module, widths: Widths) -> None:
        """Make the sizes that modules remember agree with parameters that have just been sliced to `widths`.

        The softmax scale is left alone on purpose: it stays that of the teacher during training and is folded into
        the queries at export (`fold_softmax_scale`).
        """

    @abstractmethod
    def keep_layers(self, model: nn.Module, kept: Sequence[int]) -> None:
        """Leave out all layers but these (ascending), in place. Call before anything holds on to layers."""

    @abstractmethod
    def fold_softmax_scale(self, model: nn.Module, ratio: float) -> None:
        """Multiply what the queries of every layer are made with by `ratio`, in place."""

    # --- parts of the forward pass

    @abstractmethod
    def backbone(self, model: nn.Module) -> nn.Module:
        """Token ids -> last hidden states."""

    @abstractmethod
    def embeddings(self, model: nn.Module) -> nn.Module:
        """Token ids -> what enters layer 0, shape (batch, tokens, hidden)."""

    @abstractmethod
    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The layers, in order."""

    @abstractmethod
    def attentions(self, model: nn.Module) -> list[nn.Module]:
        """The module of every layer that calls the library's attention function."""

    def layer_options(self, model: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Keyword arguments of the layers of `model` that must not be taken over from another model of the family.

        Args:
            hidden: what enters layer 0 of `model`, (B, T, D).
            kwargs: what the other model gives its layer 0, of the same batch, so that masks and position ids fit.
        """
        return {}

    @abstractmethod
    def output_modules(self, model: nn.Module, with_values: bool) -> list[nn.Module]:
        """Modules of the last layer that its output needs, and its queries and keys do not.

        Args:
            with_values: whether what makes the values is one of them.
        """

    @abstractmethod
    def final_norm(self, model: nn.Module) -> nn.Module | None:
        """What the backbone applies to the output of its last layer; None: nothing, as in post-norm models."""

    @abstractmethod
    def lm_head(self, model: nn.Module) -> nn.Module:
        """Rows that the backbone puts out (rows, hidden) -> logits (rows, vocabulary)."""

    @abstractmethod
    def lm_transform(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """First part of the head: rows that the backbone puts out (rows, hidden) -> rows that enter the decoder."""

    @abstractmethod
    def decoder(self, model: nn.Module) -> nn.Linear:
        """Second part: -> logits (rows, vocabulary). Its weight is the word embeddings' where they are tied.

        Under ZeRO-3 weight and bias exist only inside a call of this module.
        """

    # --- what is measured

    @abstractmethod
    def layer_norms(self, model: nn.Module) -> dict[str, nn.Module]:
        """Norms that read the residual stream itself (the head's own is not one of them), by name."""

    # --- checkpoints

    @abstractmethod
    def tensor_name(self, stored: str) -> str:
        """Current name of a tensor in a checkpoint file of any age."""

    @abstractmethod
    def is_head(self, name: str) -> bool:
        """Whether a parameter belongs to the language-modelling head alone (a tied decoder weight does not)."""

    @abstractmethod
    def is_unused(self, name: str) -> bool:
        """Whether the model leaves a tensor of this name out as a matter of course (pooler, next-sentence head)."""

    @abstractmethod
    def num_stored_layers(self, names: Iterable[str]) -> int:
        """Layers that the tensors in a checkpoint's files belong to."""


class Compensable(ABC):
    """What compensation refits (pruning/compensation): a family that has it can be cut with refit or full."""

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
