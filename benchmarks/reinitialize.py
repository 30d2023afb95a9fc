"""What a user without in-place resizing does at an event: gather all state, slice it, and start a new engine with it.

As lean as it gets by hand: state is sliced as soon as it is gathered, one tensor at a time, and the old engine goes
before the new one comes. Nothing of it is needed by homodistil; benchmarks/resize.py measures against it.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.parameter_shape import full_numel, full_shape
from homodistil.models.resize_plan import ResizePlan
from homodistil.resize import engine_state, load_engine_state, load_state, owned_state, state_scalars

State = dict[str, dict[str, Tensor]]
"""Kind ("weight", "exp_avg", ...) -> parameter name -> fp32 tensor, on every rank."""


class ReinitializedRun:
    """A run that replaces its engine at every event."""

    def __init__(self, engine, make_engine: Callable[[nn.Module], object], config) -> None:
        self.engine = engine
        self._make_engine = make_engine
        self._config = config  # of the model before any event

    def resize(self, plan: ResizePlan) -> None:
        counts, state = engine_state(self.engine), gather_sliced(self.engine, plan)
        module = rebuild_module(self.engine.module, self._config, state["weight"], plan)
        self.engine.destroy()
        self.engine = None
        gc.collect()
        self.engine = self._make_engine(module)
        put_back(self.engine, state, counts)


@torch.no_grad()
def gather_sliced(engine, plan: ResizePlan) -> State:
    """What survives of weights and optimizer state, whole on every rank. Collective."""
    pieces: dict[str, list] = {}
    for piece in owned_state(engine):
        pieces.setdefault(piece.name, []).append(piece)
    mine = next((list(p.states) for ps in pieces.values() for p in ps if p.states), [])
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)  # a rank may hold nothing
    kinds = ["weight", *max(everyone, key=len)]
    state: State = {kind: {} for kind in kinds}
    for name, param in engine.module.named_parameters():
        for kind in kinds:
            full = torch.zeros(full_numel(param), device=engine.device)
            for piece in pieces.get(name, ()):
                values = piece.weight if kind == "weight" else piece.states[kind]
                full[piece.start : piece.start + len(values)] = values
            dist.all_reduce(full)  # every element is on one rank, the others add zero
            full = full.view(full_shape(param))
            for dim, kept in plan.index.get(name, {}).items():
                full = full.index_select(dim, kept.to(full.device))
            state[kind][name] = full
    return state


def rebuild_module(old: nn.Module, config, weights: dict[str, Tensor], plan: ResizePlan) -> nn.Module:
    """A module with the sliced weights (fp32) as its parameters; of `old` it takes the buffers."""
    with torch.device("meta"):
        module = type(old)(copy.deepcopy(config))  # its own: `refresh` writes to it
    for name, tensor in weights.items():
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, nn.Parameter(tensor.clone()))
    for name, buffer in list(old.named_buffers()):
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, buffer.clone())
    module.tie_weights()
    bert.refresh(module, plan.widths_after)
    return module.train()


def put_back(engine, state: State, counts: dict) -> None:
    """State and counts into a new engine, whose optimizer has none yet."""

    def read(kind: str, name: str, start: int, stop: int) -> Tensor:
        return state[kind][name].flatten()[start:stop]

    load_state(engine, [kind for kind in state if kind != "weight"], state_scalars(engine, counts), read)
    load_engine_state(engine, counts)
