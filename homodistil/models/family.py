"""The contract of a model family: the interface between stock Hugging Face classes and everything else.

Nothing outside `models/` knows a family's parameter names, the order of its blocks, or what a stock configuration can
hold. A family is an object of a class that implements this contract: `named_family.py` has what follows from dotted
names alone; encoders with LayerNorm after each block share `encoders/post_norm.py`, decoders with a norm before each
block `decoders/pre_norm.py`, and differ in data.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from homodistil.kernels.attention_map_inputs import MaskKind
from homodistil.models.architecture import BERT_LIKE, Architecture
from homodistil.models.axes import AxisTable, Keep, Widths
from homodistil.models.compensable import Compensable
from homodistil.models.family_heads import FamilyHeads
from homodistil.models.model_shape import ModelShape, RequiredValue

BACKBONE_CLASS, BACKBONE_TAG = "AutoModel", "feature-extraction"
"""`auto_class` and `pipeline_tag` of a checkpoint without a language-modelling head."""


class ModelFamily(FamilyHeads):
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
    whole_heads: bool = False
    """The hidden size shrinks by whole heads only: heads keep their dims (rotary positions), and a stock configuration
    has hidden size = heads x dims of a head."""
    positions_start_behind_padding: bool = False
    """Position ids begin behind the id of the padding token, which must not change then."""
    dropout_fields: tuple[str, ...] = ()
    """Fields of the configuration that are dropout probabilities."""
    config_names: Mapping[str, str] = {}
    """Common name of a field of a configuration -> its name here, where that is another ("hidden_size" -> "n_embd")."""
    required_values: Mapping[str, RequiredValue] = {}
    """Field of a configuration -> what it has to be for a model that this family describes."""

    @property
    def is_causal(self) -> bool:
        """Whether a position sees itself and earlier ones only."""
        return self.architecture.is_causal

    @property
    def task(self) -> str:
        """What the language-modelling head predicts, by its name in data/task.py: masked tokens or the next one."""
        return "causal" if self.is_causal else "mlm"

    # --- configurations

    def field(self, usual: str) -> str:
        """The name in config.json of what other families call `usual`."""
        return self.config_names.get(usual, usual)

    @abstractmethod
    def shape(self, config: PretrainedConfig) -> ModelShape:
        """The architecture that `config` describes."""

    @abstractmethod
    def set_dropout(self, config: PretrainedConfig, probability: float) -> None:
        """Set every dropout probability of `config`, in place."""

    @abstractmethod
    def student_config(self, teacher: PretrainedConfig, widths: Widths) -> PretrainedConfig:
        """Stock configuration with these widths, alike in all layers, and their layers; the rest as in `teacher`."""

    def set_layer_kinds(self, config: PretrainedConfig, model_config: PretrainedConfig) -> None:
        """Give the layers of `config` the kinds of those of `model_config`, in place: equally many, perhaps not the
        teacher's first ones."""
        if getattr(model_config, "layer_types", None):
            config.layer_types = list(model_config.layer_types)

    @abstractmethod
    def stock_head_dim(self, widths: Widths) -> int | None:
        """Head size of the stock configuration that can hold these widths; None when none can."""

    def head_dim_obstacle(self, config: PretrainedConfig) -> str | None:
        """Why student.head_dim cannot be set for a model with this configuration, for a message; None where it can."""
        return f"the head size of the {self.name} family is fixed by hidden_size and num_attention_heads"

    def refit_obstacle(self, config: PretrainedConfig) -> str | None:
        """Why cuts of a model with this configuration cannot be compensated, for a message; None where they can."""
        return None if isinstance(self, Compensable) else f"as blocks of the {self.name} family cannot be refitted yet"

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

    def follow_origins(self, model: nn.Module, origins: Keep) -> None:
        """Make agree with `origins` what runs over entries of an axis and is no parameter: angles of rotary pairs.

        Args:
            origins: axis -> indices of the current entries in the model as it was made.
        """
        return None

    def set_positions(self, config: PretrainedConfig, model: nn.Module, origins: Keep) -> None:
        """Give a stock `config` of the widths of `model` its positions, in place. `origins`: as in `follow_origins`.

        Raises:
            ValueError: no stock configuration has them.
        """
        return None

    @abstractmethod
    def keep_layers(self, model: nn.Module, kept: Sequence[int]) -> None:
        """Leave out all layers but these (ascending), in place; their modules stay the same objects, renumbered."""

    @abstractmethod
    def fold_softmax_scale(self, model: nn.Module, ratio: float) -> None:
        """Multiply what the queries of every layer are made with by `ratio`, in place."""

    def fold_embedding_scale(self, stock: nn.Module, trained: nn.Module) -> None:
        """Change `stock` in place where its class multiplies embeddings with another number than `trained` does, so
        that its logits are the same. Such a number depends on the hidden size; it stays the teacher's in training."""
        return None

    # --- parts of the forward pass

    @abstractmethod
    def embeddings(self, model: nn.Module) -> nn.Module:
        """The module that puts out what enters layer 0, shape (batch, tokens, hidden)."""

    def embedding_entry(self, model: nn.Module) -> nn.Module:
        """What token ids enter: `embeddings`, or a module before it."""
        return self.embeddings(model)

    def embed(self, model: nn.Module, input_ids: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """What enters layer 0 of `model`, (B, T, D).

        Args:
            input_ids: int64, (B, T).
            args, kwargs: what another model of the family gives its `embedding_entry`, of the same batch.
        """
        return self.embeddings(model)(*args, **kwargs)

    @abstractmethod
    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The layers, in order."""

    def num_layer_kinds(self, model: nn.Module) -> int:
        """Kinds of layers that run by different code, or with arguments of different kinds."""
        return 1

    @abstractmethod
    def attentions(self, model: nn.Module) -> list[nn.Module]:
        """The module of every layer that computes attention."""

    calls_attention_functions: bool = True
    """Whether attention goes through the library's registry of attention functions."""

    def tap_attention(self, model: nn.Module, record: Callable[[Tensor, Tensor, Tensor | None], None]) -> None:
        """Have `record` (`ActivationHooks.record`) called with queries, keys and values of every layer, inside it."""
        for attention in self.attentions(model):
            attention.homodistil_record = record

    def softmax_scale(self, model: nn.Module) -> float:
        """What the softmax of every layer multiplies q.k with."""
        return float(self.attentions(model)[0].scaling)

    def attention_mask(self, config: PretrainedConfig, input_ids: Tensor, padding_mask: Tensor | None) -> Any:
        """What the backbone takes as its `attention_mask`.

        Args:
            input_ids, padding_mask: int64, (B, T); mask 1 = token, 0 = padding, None: no padding.
        """
        # Of two dims, the library would ask the device whether it masks anything; one of four dims it takes as final,
        # which for a causal model it is not.
        if padding_mask is None or self.is_causal:
            return padding_mask
        return padding_mask[:, None, None, :].bool().expand(-1, 1, padding_mask.shape[1], -1)

    def has_token_types(self, config: PretrainedConfig) -> bool:
        """Whether the backbone takes types of tokens, of which it has several (`Batch.token_types`)."""
        return False

    def window(self, config: PretrainedConfig) -> int | None:
        """The window (see `MaskKind`) of those layers of a model that have one; None: every layer sees all."""
        return None

    def mask_kind(self, model: nn.Module, i: int) -> MaskKind:
        """Which keys a query of layer `i` sees, padding aside."""
        return MaskKind(self.is_causal)

    def layer_options(
        self, model: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any], padding_mask: Tensor | None
    ) -> Sequence[Mapping[str, Any]]:
        """For each layer of `model`: keyword arguments that must not be taken over from another model of the family.

        Args:
            hidden: what enters layer 0 of `model`, (B, T, D).
            kwargs: what the other model gives its layer 0, of the same batch, so that masks and position ids fit.
            padding_mask: of the batch, as in `attention_mask`.
        """
        return [{}] * len(self.layers(model))

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
