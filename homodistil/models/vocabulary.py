"""The rows of a model that belong to pieces of the vocabulary: those of the input embeddings and of the decoder.

No axis of the table runs over them (axes.py): they are cut once, before training, and not in events.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from homodistil.errors import UserError
from homodistil.models.family import ModelFamily

_IDS = "_token_id"
"""End of the fields of a configuration that hold an id, a list of ids, or None."""


def vocabulary_parameters(model: nn.Module, family: ModelFamily) -> dict[str, nn.Parameter]:
    """Name -> each parameter whose dimension 0 runs over the vocabulary; one that is tied has its first name only."""
    parts = [family.backbone(model).get_input_embeddings()]
    if family.has_head(model):
        parts.append(family.decoder(model))
    wanted = {id(parameter) for part in parts for parameter in part.parameters(recurse=False)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted}


def special_ids(config: PretrainedConfig) -> set[int]:
    """Ids of tokens that a configuration names (`pad_token_id`, `eos_token_id` and the like), below its vocabulary."""
    named = (value if isinstance(value, list) else [value] for value in _special(config).values())
    return {number for numbers in named for number in numbers if 0 <= number < config.vocab_size}


@torch.no_grad()
def keep_rows(model: nn.Module, family: ModelFamily, kept: Sequence[int]) -> None:
    """Leave the rows of these ids alone, in place, in this order, with the ids in its configurations changed alike.

    Args:
        model: with all its weights in memory; tied parameters stay tied.
        kept: ids that stay, ascending.

    Raises:
        UserError: another parameter of the model has as many rows, or shares them with something else.
    """
    index = torch.tensor(kept)
    for parameter in vocabulary_parameters(model, family).values():
        parameter.data = parameter.data[index.to(parameter.device)].clone()
    new_ids = {old: new for new, old in enumerate(kept)}
    embeddings = family.backbone(model).get_input_embeddings()
    embeddings.num_embeddings, embeddings.padding_idx = len(kept), new_ids.get(embeddings.padding_idx)
    if family.has_head(model):
        family.decoder(model).out_features = len(kept)
    for config in (model.config, getattr(model, "generation_config", None)):
        _renumber(config, new_ids.get)
    model.config.vocab_size = len(kept)
    _check_shapes(model, family)


def with_vocab_size(config: PretrainedConfig, size: int) -> PretrainedConfig:
    """A configuration of so many pieces, for what depends on shapes alone: which ids stay is not known yet."""
    smaller = copy.deepcopy(config)
    smaller.vocab_size = size
    _renumber(smaller, lambda number: min(number, size - 1))
    return smaller


def _renumber(config: Any, new: Callable[[int], int | None]) -> None:
    """Change every id that `config` (None: nothing) names, in place; one without a new id is left out."""
    for name, value in _special(config).items():
        if isinstance(value, list):
            setattr(config, name, [number for number in map(new, value) if number is not None])
        elif value >= 0:
            setattr(config, name, new(value))


def _special(config: Any) -> dict[str, int | list[int]]:
    fields = {} if config is None else config.to_dict()
    return {name: value for name, value in fields.items() if name.endswith(_IDS) and isinstance(value, (int, list))}


def _check_shapes(model: nn.Module, family: ModelFamily) -> None:
    with torch.device("meta"):
        expected = family.empty(copy.deepcopy(model.config), family.head_kind(model))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, parameter in expected.named_parameters():
        now, wanted = tuple(shapes[name]), tuple(parameter.shape)
        if now != wanted:
            raise UserError(
                f"student.vocab: {name} of this {family.name} model has shape {now}, with fewer pieces {wanted}: it is "
                f"neither the input embeddings' nor the decoder's, or shares its rows; set student.vocab=all"
            )
