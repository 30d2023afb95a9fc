"""Running the backbone of a stock model outside of training: as a whole, or as far as its first layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PretrainedConfig

from homodistil.models.family import ModelFamily


def run_backbone(
    model: nn.Module,
    family: ModelFamily,
    input_ids: Tensor,
    padding_mask: Tensor | None,
    token_types: Tensor | None = None,
) -> Tensor:
    """What the backbone puts out, (B, T, D).

    Args:
        input_ids, padding_mask: int64, (B, T); mask 1 = token, 0 = padding, None: no padding.
        token_types: int64, (B, T), of models that have such; None: 0.
    """
    arguments = backbone_arguments(model.config, family, input_ids, padding_mask, token_types)
    return family.backbone(model)(**arguments)[0]


def backbone_arguments(
    config: PretrainedConfig,
    family: ModelFamily,
    input_ids: Tensor,
    padding_mask: Tensor | None,
    token_types: Tensor | None = None,
) -> dict[str, Any]:
    """What the backbone of a model with this `config` is called with. Arguments as in `run_backbone`."""
    mask = family.attention_mask(config, input_ids, padding_mask)
    takes_types = token_types is not None and family.has_token_types(config)
    types = {"token_type_ids": token_types} if takes_types else {}
    return {"input_ids": input_ids, "attention_mask": mask, **types, **family.forward_options}


class LayerInputs(NamedTuple):
    """What the layers of one model are called with for one batch."""

    hidden: Tensor
    """What enters layer 0, (B, T, D)."""
    options: list[Mapping[str, Any]]
    """Keyword arguments of every layer: masks, positions."""


def layer_inputs(
    model: nn.Module,
    family: ModelFamily,
    input_ids: Tensor,
    padding_mask: Tensor | None,
    token_types: Tensor | None = None,
) -> LayerInputs:
    """Arguments as in `run_backbone`. Nothing behind the embeddings is run."""
    layer = family.layers(model)[0]
    with suppress(_Stopped), _stopped_at(layer) as seen:
        run_backbone(model, family, input_ids, padding_mask, token_types)
    args, kwargs = seen[0]
    names = list(inspect.signature(layer.forward).parameters)
    kwargs = dict(zip(names, args, strict=False)) | kwargs
    hidden = kwargs.pop(names[0])
    options = family.layer_options(model, hidden, kwargs, padding_mask)
    return LayerInputs(hidden, [{**kwargs, **of_layer} for of_layer in options])


def input_of(module: nn.Module, run: Callable[[], Tensor]) -> Tensor:
    """What `module` is given by `run()`, which is stopped there; where it does not call `module`, its result."""
    try:
        with _stopped_at(module) as seen:
            return run()
    except _Stopped:
        args, _kwargs = seen[0]
        return args[0]


@contextmanager
def _stopped_at(module: nn.Module) -> Iterator[list[tuple[tuple, dict[str, Any]]]]:
    """Inside, a forward pass ends in `_Stopped` where it gets to `module`, and the arguments are in the list."""
    seen: list[tuple[tuple, dict[str, Any]]] = []

    def stop(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Stopped

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


class _Stopped(Exception):
    """A forward pass has got as far as it was to go."""
