"""Shrinks a live DeepSpeed engine in place: weights, master weights and optimizer state, on every rank alike.

    plan = make_plan(table, keep)          # pruning decides the keep, models/ the table
    cost = resize(engine, plan)            # right after engine.step(); then the caller refreshes module attributes

Engine, optimizer, scheduler, hooks and step counts stay the same objects and values. models/resize_plan.py translates
axes into indices and maps; rewrite.py changes values in place, by maps too; flat.py, move.py and move_partitions.py
do the arithmetic and the moving; adapters/ knows DeepSpeed's private fields; support.py says which engines are
accepted, startup_check.py tries a resize at start, verify.py looks at every event. The other functions read or fill
that state by parameter name, whatever the layout.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from homodistil.distributed.fault_injection import fault_point
from homodistil.models.resize_plan import ResizePlan, make_plan, slice_module, transform
from homodistil.resize.adapters.adapter import Adapter, GradientSlice, ReadState, StateSlice
from homodistil.resize.engine_state import engine_state, load_engine_state, state_scalars
from homodistil.resize.rewrite import apply_maps, overwrite_weights, reset_states
from homodistil.resize.support import adapter_of, check_config, check_supported
from homodistil.resize.verify import shapes_after, verify_resize

__all__ = [
    "Fragment",
    "ReadState",
    "ResizeCost",
    "ResizePlan",
    "StateSlice",
    "check_config",
    "check_supported",
    "engine_state",
    "gradient_fragments",
    "load_engine_state",
    "load_state",
    "make_plan",
    "master_weights",
    "owned_state",
    "reset_moments",
    "resize",
    "slice_module",
    "state_scalars",
    "step_applied",
    "transform",
    "write_weights",
]


@dataclass(frozen=True)
class ResizeCost:
    milliseconds: float
    """Wall time on this rank, accelerator synchronised on both ends."""
    bytes_moved: int
    """Bytes that moving sent from one rank to another, over all ranks (0 at stage 0), without gathering for maps."""


@torch.no_grad()
def resize(engine, plan: ResizePlan) -> ResizeCost:
    """Apply `plan` to the engine's parameters and all their optimizer state, in place. Every rank calls it.

    Where the plan has maps, weights and first moments are contracted with them, second moments with the squared maps.

    Only right after `engine.step()` at a gradient accumulation boundary (or before the first step). Sizes that modules
    remember (Linear.in_features, ...) are the caller's to refresh. The engine has passed `check_supported`.

    Raises:
        ValueError: the plan was made for a model of other parameter names or sizes.
        RuntimeError: gradients wait for a step, or ranks hold different plans.
        CheckFailed: the state after the event is not what the plan says (verify.py).
    """
    adapter = adapter_of(engine)
    _check_boundary(adapter)
    adapter.index_by_parameter(plan)  # a plan for another model is refused before anything has changed
    selection = plan.as_selection()
    expected = shapes_after(adapter, selection)
    device = next(engine.module.parameters()).device
    _check_agreement(plan, device)
    fault_point("resize.before")
    _synchronize(device)
    start = time.perf_counter()
    if plan.maps:
        apply_maps(adapter, plan)
    bytes_moved = adapter.resize(selection)
    fault_point("resize.moved")
    verify_resize(adapter, expected)
    _synchronize(device)
    return ResizeCost((time.perf_counter() - start) * 1e3, bytes_moved)


@torch.no_grad()
def write_weights(engine, weights: Mapping[str, Tensor]) -> None:
    """Overwrite parameters (frozen ones too, which round to their dtype); optimizer state stays. Every rank calls it.

    Only when a resize would be allowed.

    Args:
        weights: full, by parameter name, at the current widths, alike on every rank; those that are absent stay.

    Raises:
        RuntimeError: gradients wait for a step.
        ValueError: an unknown name, or another shape; nothing has changed.
    """
    adapter = adapter_of(engine)
    _check_boundary(adapter)
    overwrite_weights(adapter, weights)


@torch.no_grad()
def reset_moments(engine) -> None:
    """Optimizer state as before the first step, moments and their counts. No communication."""
    reset_states(adapter_of(engine))


@torch.no_grad()
def gradient_fragments(engine, names: Container[str] | None = None) -> Iterator[GradientSlice]:
    """This rank's share of the reduced gradients, with the fp32 weights they belong to. No communication.

    Call after `engine.backward` at the accumulation boundary and before `engine.step`. Over all ranks, every element
    of every trainable parameter appears exactly once: sums over ranks are complete. Fragments may be views of live
    state: read them, do not change them.

    Args:
        names: parameters that are wanted; None: all.
    """
    yield from adapter_of(engine).gradient_fragments(names)


@torch.no_grad()
def master_weights(engine) -> dict[str, Tensor]:
    """Full fp32 weights by parameter name, frozen ones too, as new tensors on every rank. Every rank calls it."""
    return adapter_of(engine).master_weights()


def owned_state(engine) -> Iterator[StateSlice]:
    """This rank's share of all weights and optimizer state, as views of the live tensors. No communication.

    Over all ranks, every element of every parameter (frozen ones too) appears exactly once.
    """
    yield from adapter_of(engine).owned_state()


@torch.no_grad()
def load_state(engine, state_names: list[str], scalars: dict, read: ReadState) -> None:
    """Overwrite all weights and optimizer state, whatever the engine's layout. Every rank calls it.

    Args:
        state_names: optimizer states with one value an element (`exp_avg`, ...); [] before the first step.
        scalars: optimizer states that are the same for all elements (`step`).
        read: gives any stretch of any parameter; each rank asks for what it holds.
    """
    adapter_of(engine).load_state(state_names, scalars, read)


def step_applied(engine) -> bool:
    """Whether the last `engine.step()` at a boundary changed the weights: not when a gradient was not finite."""
    return bool(engine.was_step_applied())


def _check_boundary(adapter: Adapter) -> None:
    engine = adapter.engine
    if engine.micro_steps % engine.gradient_accumulation_steps() or adapter.has_pending_gradients():
        raise RuntimeError("resize: gradients wait for a step; resize only right after engine.step() at a boundary")


def _check_agreement(plan: ResizePlan, device: torch.device) -> None:
    """Ranks with different plans would exchange garbage. Compares the first 63 bits of the hash."""
    mine = torch.tensor([int(plan.hash[:16], 16) >> 1], device=device)
    hashes = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(hashes, mine)
    differing = [rank for rank, other in enumerate(hashes) if int(other) != int(hashes[0])]
    if differing:
        raise RuntimeError(
            f"resize: ranks {differing} hold another plan than rank 0; the event must be the same everywhere"
        )


def _synchronize(device: torch.device) -> None:
    """Wait for kernels and for DeepSpeed's reduction stream; nothing to wait for on the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
