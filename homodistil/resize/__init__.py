"""Shrinks a live DeepSpeed engine in place on all ranks: weights, master weights and optimizer state.

    plan = make_plan(table, keep)          # pruning decides `keep`, models/ defines the table
    cost = resize(engine, plan)            # right after engine.step(); the caller then updates module attributes
    cost = remove_parameters(engine, names, detach)     # likewise: whole parameters leave (removal.py)

Engine, optimizer, scheduler and hooks stay the same objects, and step counts keep their values. models/resize_plan.py
translates axes into indices and maps. rewrite.py changes values in place; flat.py, move.py and move_partitions.py
compute and move partitions; adapters/ access DeepSpeed's private fields. support.py decides which engines are accepted,
startup_check.py tries a resize at start, and verify.py checks every event. The further functions of this module read or
write the state by parameter name, independent of the layout.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Mapping

import torch
from torch import Tensor

from homodistil.distributed.fault_injection import fault_point
from homodistil.models.resize_plan import ResizePlan, make_plan, slice_module, transform
from homodistil.resize.adapters.adapter import GradientSlice, ReadState, StateSlice
from homodistil.resize.boundary import ResizeCost, check_agreement, check_boundary, synchronize
from homodistil.resize.engine_state import engine_state, load_engine_state, state_scalars
from homodistil.resize.removal import check_removable, remove_parameters
from homodistil.resize.rewrite import apply_maps, overwrite_weights, reset_states
from homodistil.resize.support import adapter_of, check_config, check_supported
from homodistil.resize.verify import shapes_after, verify_resize

__all__ = [
    "ReadState",
    "ResizeCost",
    "ResizePlan",
    "StateSlice",
    "check_config",
    "check_removable",
    "check_supported",
    "engine_state",
    "gradient_fragments",
    "load_engine_state",
    "load_state",
    "make_plan",
    "master_weights",
    "owned_state",
    "remove_parameters",
    "reset_moments",
    "resize",
    "slice_module",
    "state_scalars",
    "step_applied",
    "transform",
    "write_weights",
]


@torch.no_grad()
def resize(engine, plan: ResizePlan) -> ResizeCost:
    """Apply `plan` to the engine's parameters and all their optimizer state, in place. Every rank calls it.

    If the plan has maps, weights and first moments are multiplied by them, second moments by the squared maps.

    Call it only right after `engine.step()` at a gradient accumulation boundary, or before the first step. The caller
    updates the sizes that modules store (Linear.in_features, ...).

    Args:
        engine: a DeepSpeed engine that has passed `check_supported`.
        plan: the same on every rank.

    Raises:
        ValueError: the plan was made for a model with other parameter names or sizes.
        RuntimeError: accumulated gradients have not been applied yet, or ranks have different plans.
        CheckFailed: the state after the event does not match the plan (verify.py).
    """
    adapter = adapter_of(engine)
    check_boundary(adapter)
    adapter.index_by_parameter(plan)  # a plan for another model is refused before anything has changed
    selection = plan.as_selection()
    expected = shapes_after(adapter, selection)
    device = next(engine.module.parameters()).device
    check_agreement(plan.hash, device)
    fault_point("resize.before")
    synchronize(device)
    start = time.perf_counter()
    if plan.maps:
        apply_maps(adapter, plan)
    bytes_moved = adapter.resize(selection)
    fault_point("resize.moved")
    verify_resize(adapter, expected)
    synchronize(device)
    return ResizeCost((time.perf_counter() - start) * 1e3, bytes_moved)


@torch.no_grad()
def write_weights(engine, weights: Mapping[str, Tensor]) -> None:
    """Overwrite parameters, but not the optimizer state. Every rank calls it, only when `resize` would be allowed.

    Args:
        weights: parameter name -> full tensor at the current widths, the same on every rank. Other parameters keep
            their values; frozen parameters are rounded to their dtype.

    Raises:
        RuntimeError: accumulated gradients have not been applied yet.
        ValueError: a name is unknown or a shape differs; nothing has changed.
    """
    adapter = adapter_of(engine)
    check_boundary(adapter)
    overwrite_weights(adapter, weights)


@torch.no_grad()
def reset_moments(engine) -> None:
    """Reset moments and step counts of the optimizer to their values before the first step. No communication."""
    reset_states(adapter_of(engine))


@torch.no_grad()
def gradient_fragments(engine, names: Container[str] | None = None) -> Iterator[GradientSlice]:
    """The reduced gradients that this rank holds, with the fp32 weights they belong to. No communication.

    Call it after `engine.backward` at the accumulation boundary and before `engine.step`. Over all ranks, every element
    of every trainable parameter appears exactly once, so that sums over ranks are complete. The tensors may be views
    of the live state; do not change them.

    Args:
        names: names of the parameters to return; None: all.
    """
    yield from adapter_of(engine).gradient_fragments(names)


@torch.no_grad()
def master_weights(engine) -> dict[str, Tensor]:
    """Parameter name -> full fp32 weights, also frozen ones, as new tensors on every rank. Every rank calls it."""
    return adapter_of(engine).master_weights()


def owned_state(engine) -> Iterator[StateSlice]:
    """The weights and optimizer state that this rank saves, as views of the live tensors. No communication.

    Over all ranks, every element of every parameter (also frozen ones) appears exactly once.
    """
    yield from adapter_of(engine).owned_state()


@torch.no_grad()
def load_state(engine, state_names: list[str], scalars: dict, read: ReadState) -> None:
    """Overwrite all weights and optimizer state, for any layout of the engine. Every rank calls it.

    Args:
        state_names: optimizer states with one value per element (`exp_avg`, ...); [] before the first step.
        scalars: optimizer states that are the same for all elements (`step`).
        read: returns any range of elements of a parameter; each rank reads the ranges that it holds.
    """
    adapter_of(engine).load_state(state_names, scalars, read)


def step_applied(engine) -> bool:
    """Whether the last `engine.step()` at a boundary changed the weights; DeepSpeed skips it on an overflow."""
    return bool(engine.was_step_applied())
