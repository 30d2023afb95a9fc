"""Parameters of a stock model as llama.cpp stores them, and back: names, order of rows, offsets of norms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from homodistil.data.sources.gguf.container import GgufFile
from homodistil.errors import UserError
from homodistil.export.formats.gguf.architectures import FIELD, Architecture, rotary_settings

ROTARY_FACTORS = "rope_freqs.weight"
"""Wavelength of each rotary pair, divided by the one that theta gives (Llama 3)."""
OUTPUT = "output.weight"
_ENDS = (".weight", ".bias")


class Place(NamedTuple):
    """Where a parameter lies in a file, and how it differs there."""

    name: str
    parameter: Tensor
    """Of the model, with its own values."""
    is_transposed: bool = False
    offset: float = 0.0
    heads: int | None = None
    """Heads whose rows llama.cpp has in the order 0, H/2, 1, H/2 + 1, ...; None: rows as they are."""

    def stored(self) -> np.ndarray:
        """The values for the file, float32."""
        values = self.parameter.detach().float().numpy()
        if self.heads is not None:
            values = values.reshape(self.heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        return np.ascontiguousarray(values.T if self.is_transposed else values) + np.float32(self.offset)

    def load(self, values: np.ndarray) -> None:
        """Set the parameter to the values of a file, float32. Raises `ValueError` where the shapes differ."""
        values = (values - np.float32(self.offset)).T if self.is_transposed else values - np.float32(self.offset)
        if values.shape != self.parameter.shape:
            raise ValueError(f"{self.name} has shape {list(values.shape)}, the model {list(self.parameter.shape)}")
        if self.heads is not None:
            values = values.reshape(self.heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        with torch.no_grad():
            self.parameter.copy_(torch.from_numpy(np.ascontiguousarray(values)))


def places(model: nn.Module, architecture: Architecture) -> Iterator[Place]:
    """Every parameter of a backbone, or of one with its language-modelling head; a tied matrix once.

    Raises:
        UserError: llama.cpp has no place for one of them.
    """
    config, transposed = model.config, _transposed(model)
    names = gguf.get_tensor_name_map(_number(architecture), config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": getattr(config, "num_key_value_heads", None)}
    for name, parameter in model.named_parameters():
        stored = names.get_name(_full_name(name, model, architecture), try_suffixes=_ENDS)
        if stored is None:
            raise UserError(f"{FIELD}: llama.cpp's {architecture.name} has no place for {name}; take another format")
        part = stored.split(".")[-2]
        yield Place(
            stored,
            parameter,
            name in transposed,
            architecture.norm_offset if part.endswith("norm") else 0.0,
            heads.get(part) if architecture.rotates_neighbours else None,
        )


def stored_tensors(model: nn.Module, architecture: Architecture) -> Iterator[tuple[str, np.ndarray]]:
    """Name -> values (float32) of all that the file of a model holds. Raises `UserError`: see `places`."""
    written = set()
    for place in places(model, architecture):
        written.add(place.name)
        yield place.name, place.stored()
    if architecture.needs_output and OUTPUT not in written:
        yield OUTPUT, model.get_output_embeddings().weight.detach().float().numpy()
    if _is_llama3(model):
        yield ROTARY_FACTORS, _rotary(model).float().numpy()


def load_tensors(file: GgufFile, model: nn.Module, architecture: Architecture) -> None:
    """Set every parameter of `model`, and its scaled rotary frequencies, to what a file holds.

    Raises:
        UserError: a tensor is missing, damaged or of another shape.
    """
    for place in places(model, architecture):
        if place.name not in file.tensors:
            raise UserError(f"{file.where}: has no {place.name}; write it again with --force")
        try:
            place.load(file.tensor(place.name))
        except ValueError as error:
            raise UserError(f"{file.where}: {error}; write it again with --force") from None
    if _is_llama3(model):
        rotary = model.base_model.rotary_emb
        rotary.inv_freq = _plain_frequencies(model) / torch.from_numpy(file.tensor(ROTARY_FACTORS))


def _number(architecture: Architecture) -> int:
    return next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)


def _full_name(name: str, model: nn.Module, architecture: Architecture) -> str:
    """As in a model with its head, which is how gguf knows the names."""
    inside = f"{model.base_model_prefix}."
    if not architecture.is_causal:
        return name.removeprefix(inside)
    return name if model.base_model is not model else architecture.prefix + name


def _transposed(model: nn.Module) -> set[str]:
    """Names of matrices with a row per input, not per output."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}


def _is_llama3(model: nn.Module) -> bool:
    return any(settings.get("rope_type") == "llama3" for settings in rotary_settings(model.config))


def _rotary(model: nn.Module) -> Tensor:
    return _plain_frequencies(model) / model.base_model.rotary_emb.inv_freq


def _plain_frequencies(model: nn.Module) -> Tensor:
    """Of each rotary pair (H/2), as theta alone gives them."""
    head_dim, theta = model.config.head_dim, rotary_settings(model.config)[0]["rope_theta"]
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
