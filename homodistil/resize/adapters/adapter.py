"""The interface of `resize/` to DeepSpeed's optimizer wrappers, and the code that all adapters share.

There is one subclass per wrapper class, chosen by `support.adapter_of`. Only these subclasses access private fields of
DeepSpeed. Each lists the fields that it relies on, and `support.check_supported` verifies them at start.

For code that reads or writes state (importance, checkpoints, export) a wrapper is a list of `StateGroup`: an fp32
tensor that the torch optimizer updates, its optimizer state, and the elements of parameters that it contains.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Set
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from homodistil.models.parameter_shape import full_shape
from homodistil.models.resize_plan import DimIndex, ResizePlan, index_by_parameter, select, set_param_data
from homodistil.resize.flat import WHOLE

ReadState = Callable[[str, str, int, int], Tensor]
"""(kind, parameter name, start, stop) -> those elements, flat; kind is "weight" or the name of an optimizer state."""


CONVERTED_NUMEL = 1 << 19
"""Elements of a gradient converted to fp32 at a time on a CPU, to fit into its caches."""


class MasterSlice(NamedTuple):
    """Elements [start, start + numel) of a parameter row-major, at `position` of a flat tensor of this rank."""

    name: str
    start: int
    position: int
    numel: int


class StateGroup(NamedTuple):
    master: Tensor
    """The fp32 tensor that the optimizer updates, the key of its state; for a frozen parameter the parameter itself."""
    state: dict
    """The live optimizer state of `master`; empty before the first step."""
    held: list[MasterSlice]
    """The elements of parameters that `master` contains."""
    replicated: bool
    """Whether every rank holds the whole group, instead of a partition."""

    def per_element(self) -> dict[str, Tensor]:
        """The states with one value per element (both moments), without counts such as `step`."""
        return {k: v for k, v in self.state.items() if torch.is_tensor(v) and v.shape == self.master.shape}


class StateSlice(NamedTuple):
    """Elements [start, start + n) of a parameter and their optimizer state, as views of the live tensors."""

    name: str
    start: int
    weight: Tensor
    """(n,) fp32 master weight, or the value of a frozen parameter in the dtype of the parameter."""
    states: dict[str, Tensor]
    """Optimizer state name -> (n,); empty for frozen parameters and before the first step."""


class GradientSlice(NamedTuple):
    """Weight and gradient of elements [start, start + n) of a parameter in row-major order, before the step."""

    name: str
    start: int
    weight: Tensor
    """(n,) fp32 master weight."""
    gradient: Tensor
    """(n,) fp32, averaged over micro-batches and ranks, unscaled, unclipped."""


class Adapter(ABC):
    """Access to weights and optimizer state of one engine, for one class of optimizer wrappers."""

    fields: ClassVar[dict[str, type]] = {}
    """Attributes of the wrapper that the adapter relies on, and their types."""

    def __init__(self, engine):
        self.engine = engine
        self.optimizer = engine.optimizer
        self.parameters: dict[str, nn.Parameter] = dict(engine.module.named_parameters())
        self.name_of = {param: name for name, param in self.parameters.items()}

    @abstractmethod
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer inside the wrapper."""

    @abstractmethod
    def groups(self) -> list[StateGroup]:
        """The groups of trained parameters on this rank."""

    @abstractmethod
    def gradients(self, i: int) -> Callable[[MasterSlice], Tensor]:
        """A function from a slice held by `groups()[i]` to its reduced gradient (multiplied by the loss scale)."""

    @abstractmethod
    def check_layout(self) -> None:
        """Raise ValueError that names the first difference if the state is not laid out as this adapter expects."""

    @abstractmethod
    def has_pending_gradients(self) -> bool:
        """Whether there are accumulated gradients that no step has applied yet."""

    def resize(self, plan: ResizePlan) -> int:
        """Apply `plan` to weights and state in place. Collective. Returns the bytes sent by all ranks."""
        return self.keep(self.index_by_parameter(plan), frozenset())

    def remove(self, leaving: Set[nn.Parameter]) -> int:
        """Take `leaving` out of weights, optimizer and state; what stays keeps its values and its order. Collective.

        They are empty afterwards, and the caller takes them out of the module. Returns the bytes sent by all ranks.
        """
        bytes_moved = self.keep(dict.fromkeys(leaving, WHOLE), leaving)
        for param in leaving:
            set_param_data(param, torch.empty(0, dtype=param.dtype, device=param.device))
            param.requires_grad_(False)  # DeepSpeed's hooks go on listing it at stage 3, and wait for no gradient of it
        return bytes_moved

    @abstractmethod
    def keep(self, index_of: Mapping[nn.Parameter, DimIndex], leaving: Set[nn.Parameter]) -> int:
        """Keep what `index_of` says of each parameter; an absent one stays whole. Collective. Returns the bytes sent.

        Args:
            leaving: parameters of which nothing stays (`WHOLE`): the wrapper must not name them afterwards.
        """

    def emptied_groups(self, leaving: Set[str]) -> list[int]:
        """Groups that would hold no parameter any more without those named."""
        return [i for i, params in enumerate(self.group_params()) if {self.name_of[p] for p in params} <= leaving]

    @abstractmethod
    def group_params(self) -> list[list[nn.Parameter]]:
        """Trained parameters of the model, by the groups that the wrapper divides them into."""

    @abstractmethod
    def weights_from_masters(self) -> None:
        """Copy the masters to the model's weights, after masters or states have been changed. Collective."""

    def rebuild_maps(self) -> None:
        """Rebuild the wrapper's own tables about groups and their states. Does nothing for wrappers without tables."""
        return None

    def frozen_groups(self) -> list[StateGroup]:
        """Parameters in no optimizer group; they are whole on every rank, unless the wrapper partitions them, too."""
        trained = self._trained_names()
        return [
            StateGroup(param, {}, [MasterSlice(name, 0, 0, param.numel())], replicated=True)
            for name, param in self.parameters.items()
            if name not in trained
        ]

    def _trained_names(self) -> set[str]:
        return {name for name, param in self.parameters.items() if param.requires_grad}

    def padding(self) -> Iterator[Tensor]:
        """The parts of flat tensors that belong to no parameter, and must be zero. Empty without padding."""
        return iter(())

    def loss_scale(self) -> float:
        return float(getattr(self.optimizer, "loss_scale", 1.0)) if self.engine.fp16_enabled() else 1.0

    def owned_state(self) -> Iterator[StateSlice]:
        """See `homodistil.resize.owned_state`."""
        for group, held in self._shares(self.groups() + self.frozen_groups()):
            states = {key: held_part(value, held) for key, value in group.per_element().items()}
            yield StateSlice(held.name, held.start, held_part(group.master, held), states)

    def gradient_fragments(self, names: Container[str] | None = None) -> Iterator[GradientSlice]:
        """See `homodistil.resize.gradient_fragments`."""
        scale, groups = self.loss_scale(), self.groups()
        access = {id(group.held): self.gradients(i) for i, group in enumerate(groups)}
        for group, held in self._shares(groups):
            if names is not None and held.name not in names:
                continue
            gradient = access[id(group.held)](held).flatten()
            assert gradient.numel() == held.numel, "gradients do not follow the layout"
            yield from _unscaled(held, held_part(group.master, held), gradient, scale)

    def _shares(self, groups: list[StateGroup]) -> Iterator[tuple[StateGroup, MasterSlice]]:
        """The slices of `groups` that this rank reports: all of its partitions, and its share of replicated groups."""
        turn, rank, world_size = itertools.count(), dist.get_rank(), dist.get_world_size()
        for group in groups:
            for held in group.held:
                if not group.replicated or next(turn) % world_size == rank:
                    yield group, held

    def master_weights(self) -> dict[str, Tensor]:
        """See `homodistil.resize.master_weights`."""
        groups = self.groups() + self.frozen_groups()
        device = next(iter(self.parameters.values())).device
        whole = {held.name for group in groups if group.replicated for held in group.held}
        held_by_name: dict[str, list[tuple[StateGroup, MasterSlice]]] = {}
        for group in groups:
            for held in group.held:
                held_by_name.setdefault(held.name, []).append((group, held))
        weights = {}
        for name, param in self.parameters.items():
            full = torch.zeros(math.prod(full_shape(param)), device=device)
            for group, held in held_by_name.get(name, ()):
                full[held.start : held.start + held.numel] = held_part(group.master, held)
            if name not in whole:
                dist.all_reduce(full)  # every element is on one rank; all other ranks add zero
            weights[name] = full.view(full_shape(param))
        return weights

    def load_state(self, state_names: list[str], scalars: dict, read: ReadState) -> None:
        """See `homodistil.resize.load_state`."""
        for group in self.frozen_groups():
            for held in group.held:
                held_part(group.master, held).copy_(read("weight", held.name, held.start, held.start + held.numel))
        for group in self.groups():
            state = self.torch_optimizer().state[group.master]
            state |= {key: self._scalar(value, group.master) for key, value in scalars.items()}
            for kind in ("weight", *state_names):
                target = group.master if kind == "weight" else state.get(kind)
                if target is None or target.shape != group.master.shape:
                    target = state[kind] = torch.zeros_like(group.master, requires_grad=False)
                for held in group.held:
                    held_part(target, held).copy_(read(kind, held.name, held.start, held.start + held.numel))
        self.weights_from_masters()

    def _scalar(self, value: object, master: Tensor) -> object:
        """A count for the optimizer state; as a tensor it must be on the device of the masters if kernels read it."""
        if not torch.is_tensor(value):
            return value
        settings = self.torch_optimizer().param_groups[0]
        on_device = settings.get("fused") or settings.get("capturable")
        return value.clone().to(master.device if on_device else "cpu")

    def index_by_parameter(self, plan: ResizePlan) -> dict[nn.Parameter, DimIndex]:
        return index_by_parameter(self.parameters, plan)


def held_part(tensor: Tensor, held: MasterSlice) -> Tensor:
    """The part `held` of a flat (or flattened) tensor of this rank, as a view."""
    return tensor.detach().view(-1)[held.position : held.position + held.numel]


def _unscaled(held: MasterSlice, weight: Tensor, gradient: Tensor, scale: float) -> Iterator[GradientSlice]:
    """The gradient itself, or copies in chunks if it must be converted to fp32 or unscaled."""
    if gradient.dtype == torch.float32 and scale == 1.0:
        yield GradientSlice(held.name, held.start, weight, gradient)
        return
    step = CONVERTED_NUMEL if gradient.device.type == "cpu" else held.numel
    for begin in range(0, held.numel, step):
        converted = gradient[begin : begin + step].to(torch.float32, copy=True)
        if scale != 1.0:
            converted /= scale
        yield GradientSlice(held.name, held.start + begin, weight[begin : begin + step], converted)


def select_param(param: nn.Parameter, index: DimIndex) -> None:
    """Slice a parameter that is whole on this rank."""
    set_param_data(param, select(param.data, index))


def select_state(state: dict, shape: torch.Size, index: DimIndex) -> None:
    """Slice every optimizer state tensor of a parameter of old shape `shape` (in place); scalars do not change."""
    for key, value in state.items():
        if torch.is_tensor(value) and value.shape == shape:
            state[key] = select(value, index)
