"""What `resize/` asks of each kind of DeepSpeed optimizer wrapper, and the bookkeeping they share.

One subclass a wrapper (plain.py, zero.py), found by `support.adapter_of`. Private fields of DeepSpeed are touched in
those subclasses only; each lists the ones it relies on, and `support.check_supported` verifies them at start.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from homodistil.resize.move import set_param_data
from homodistil.resize.plan import DimIndex, ResizePlan, select


class Fragment(NamedTuple):
    """Elements [start, start + n) of a parameter, flattened row by row, as the optimizer is about to see them."""

    name: str
    start: int
    weight: Tensor
    """(n,) fp32, the master weight before the step."""
    gradient: Tensor
    """(n,) fp32, averaged over micro-batches and ranks, unscaled, unclipped."""


class Adapter(ABC):
    """One engine's weights and optimizer state, as its wrapper holds them."""

    fields: ClassVar[dict[str, type]] = {}
    """Attributes of the wrapper that the adapter relies on, and their types."""

    def __init__(self, engine):
        self.engine = engine
        self.optimizer = engine.optimizer
        self.parameters: dict[str, nn.Parameter] = dict(engine.module.named_parameters())

    @abstractmethod
    def check_layout(self) -> None:
        """Raise ValueError, naming what differs, unless state lies where this adapter expects it."""

    @abstractmethod
    def has_pending_gradients(self) -> bool:
        """Whether gradients wait for a step."""

    @abstractmethod
    def resize(self, plan: ResizePlan) -> int:
        """Apply `plan` to weights and state in place. Collective. Returns bytes sent between ranks, over all ranks."""

    @abstractmethod
    def gradient_fragments(self) -> Iterator[Fragment]:
        """See `homodistil.resize.gradient_fragments`."""

    @abstractmethod
    def master_weights(self) -> dict[str, Tensor]:
        """See `homodistil.resize.master_weights`."""

    def index_by_parameter(self, plan: ResizePlan) -> dict[nn.Parameter, DimIndex]:
        return index_by_parameter(self.parameters, plan)


def index_by_parameter(parameters: dict[str, nn.Parameter], plan: ResizePlan) -> dict[nn.Parameter, DimIndex]:
    """The plan by parameter object. ValueError when the plan was made for a model of other names or sizes."""
    found = {}
    for name, index in plan.index.items():
        if name not in parameters:
            raise ValueError(
                f"resize plan names {name!r}, which the model lacks (tied parameters go by their first name)"
            )
        param = parameters[name]
        for dim, size in plan.sizes[name].items():
            if param.ndim <= dim or param.shape[dim] != size:
                raise ValueError(f"resize plan: dim {dim} of {name} should be {size}, found shape {tuple(param.shape)}")
        found[param] = index
    return found


def select_param(param: nn.Parameter, index: DimIndex) -> None:
    """Slice a parameter that is whole on this rank."""
    set_param_data(param, select(param.data, index))


def select_state(state: dict, shape: torch.Size, index: DimIndex) -> None:
    """Slice, in place, every optimizer state tensor of a whole parameter of (old) `shape`; scalars stay."""
    for key, value in state.items():
        if torch.is_tensor(value) and value.shape == shape:
            state[key] = select(value, index)
