"""Counts and settings of the engine as plain values, which a checkpoint holds besides weights and optimizer state.

They are independent of ranks, stage and wrapper, like the rest of a checkpoint. Values that a wrapper does not have (a
loss scaler without fp16) are skipped, and values that depend on the number of micro-batches are recomputed.
"""

from __future__ import annotations

import torch

from homodistil.resize.adapters.adapter import StateGroup
from homodistil.resize.support import adapter_of

_COUNTS = ("global_steps", "global_samples", "skipped_steps")
_GROUP_SETTINGS = ("lr", "initial_lr", "betas", "eps", "weight_decay")
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def engine_state(engine) -> dict:
    """Counts, LR schedule, loss scale, settings of the parameter groups and step counts, as JSON values."""
    scaler = _dynamic_scaler(engine)
    return {
        "counts": {name: getattr(engine, name) for name in _COUNTS},
        "schedule": engine.lr_scheduler.state_dict() if engine.lr_scheduler else None,
        "loss_scaler": _fields(scaler) if scaler else None,
        "parameter_groups": [
            {name: _plain(group[name]) for name in _GROUP_SETTINGS if name in group}
            for group in engine.basic_optimizer.param_groups
        ],
        "scalars": _scalars(engine),
    }


def load_engine_state(engine, state: dict) -> None:
    """Set the values of `engine_state`, possibly of another engine. Call it right before or after `load_state`."""
    for name, value in state["counts"].items():
        setattr(engine, name, value)
    # Checkpoints are saved between optimizer steps; the number of micro-batches per step may have changed.
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    if engine.lr_scheduler and state["schedule"] is not None:
        engine.lr_scheduler.load_state_dict(state["schedule"])
    optimizer = engine.basic_optimizer
    for group, saved in zip(optimizer.param_groups, state["parameter_groups"], strict=True):
        group |= {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        if not _is_torchs(optimizer):  # apex counts steps per group; DeepSpeed's FusedAdam starts from this count
            group |= state["scalars"]
    scaler = _dynamic_scaler(engine)
    if scaler and state["loss_scaler"]:
        for name, value in state["loss_scaler"].items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)


def state_scalars(engine, state: dict) -> dict:
    """The step counts in `state` (of `engine_state`) in the type that the engine's optimizer uses."""
    as_tensor = _is_torchs(engine.basic_optimizer)
    # float32 as in torch; fused kernels accept no other dtype.
    return {
        name: torch.tensor(value, dtype=torch.float32) if as_tensor else int(value)
        for name, value in state["scalars"].items()
    }


def _scalars(engine) -> dict[str, float]:
    """Maximum of each count over the groups: DeepSpeed's FusedAdam counts in one of several parameters only."""
    scalars: dict[str, float] = {}
    for group in adapter_of(engine).groups():
        for name, value in _counts_of(group).items():
            scalars[name] = max(scalars.get(name, value), value)
    for group in engine.basic_optimizer.param_groups:
        if "step" in group:
            scalars["step"] = max(scalars.get("step", 0.0), float(group["step"]))
    return scalars


def _counts_of(group: StateGroup) -> dict[str, float]:
    per_element = group.per_element()
    return {name: float(value) for name, value in group.state.items() if name not in per_element}


def _is_torchs(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.Adam)  # or a subclass; those of DeepSpeed and apex are not


def _plain(value: object) -> object:
    return value.item() if torch.is_tensor(value) else value


def _dynamic_scaler(engine) -> object | None:
    """The object with the dynamic loss scale: a scaler in ZeRO's wrappers, a config in the fp16 wrappers of stage 0.

    None if the scale is fixed.
    """
    scaler = getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)
    is_dynamic = getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False)
    return scaler if is_dynamic else None


def _fields(scaler: object) -> dict:
    return {name: getattr(scaler, name) for name in _SCALER_FIELDS if hasattr(scaler, name)}
