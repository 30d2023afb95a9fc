"""Decides which engines can be resized, and chooses the adapter.

Resizing rewrites private fields of DeepSpeed. An engine is therefore accepted only if its configuration, wrapper class,
fields and memory layout are known to work. Any difference is an error at start that names it, instead of silent
corruption later.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping

import torch

from homodistil.distributed import ranks
from homodistil.errors import UserError
from homodistil.resize.adapters.adapter import Adapter
from homodistil.resize.adapters.bf16 import Bf16Adapter
from homodistil.resize.adapters.fused import FusedAdapter
from homodistil.resize.adapters.offload import OffloadAdapter
from homodistil.resize.adapters.plain import PlainAdapter, UnfusedAdapter
from homodistil.resize.adapters.zero import ZeroAdapter
from homodistil.resize.adapters.zero3 import Zero3Adapter
from homodistil.resize.ds_config_rules import refusals
from homodistil.resize.startup_check import try_resize

DEEPSPEED_TESTED = "0.19.8"

# Exact classes, because subclasses (ZenFlow, SuperOffload, pipeline, hybrid engine) have other layouts.
ENGINE_CLASS = "deepspeed.runtime.engine.DeepSpeedEngine"
ADAPTERS: dict[str, type[Adapter]] = {
    "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer": UnfusedAdapter,
    "deepspeed.runtime.fp16.fused_optimizer.FP16_Optimizer": FusedAdapter,
    "deepspeed.runtime.bf16_optimizer.BF16_Optimizer": Bf16Adapter,
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": ZeroAdapter,
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": Zero3Adapter,
}


@torch.no_grad()
def check_supported(engine) -> None:
    """Raise `UserError` unless `engine` (a DeepSpeed engine) can be resized. Every rank calls it before training.

    An untested version of DeepSpeed is accepted with a warning if all checks pass.
    """
    check_config(engine._config._param_dict)
    for field, actual, allowed in _unsupported_structure(engine):
        raise UserError(f"ds_config {field}: found {actual}; resizing allows {allowed}")
    adapter = adapter_of(engine)
    for field, expected in adapter.fields.items():
        value = getattr(adapter.optimizer, field, None)
        if not isinstance(value, expected):
            actual = f"a {type(value).__name__}" if hasattr(adapter.optimizer, field) else "nothing"
            raise _unknown_inside(
                f"{_class_name(adapter.optimizer)}.{field}: found {actual}, not a {expected.__name__}"
            )
    for check in (adapter.check_layout, lambda: try_resize(adapter)):
        differences = ranks.failures(_difference(check))
        if differences:
            raise _unknown_inside("; ".join(differences))
    _warn_if_untested()


def _difference(check: Callable[[], None]) -> str | None:
    try:
        check()
    except (ValueError, AttributeError, TypeError, KeyError, IndexError, AssertionError) as error:
        return f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
    return None


def check_config(engine_config: Mapping) -> None:
    """Raise `UserError` if DeepSpeed's JSON has a setting that does not allow resizing (ds_config_rules.py)."""
    for field, actual, allowed in refusals(engine_config):
        raise UserError(f"ds_config {field}: found {actual}; resizing allows {allowed}")


def adapter_of(engine) -> Adapter:
    """The adapter for the optimizer wrapper of the engine. Raises `UserError` for an unsupported class."""
    if _class_name(engine) != ENGINE_CLASS:
        raise UserError(f"engine: found {_class_name(engine)}, resizing allows {ENGINE_CLASS} only")
    optimizer = engine.optimizer
    # DeepSpeed uses a torch optimizer without a wrapper only at stage 0 in fp32.
    if isinstance(optimizer, torch.optim.Optimizer):
        return PlainAdapter(engine)
    name = _class_name(optimizer)
    if name not in ADAPTERS:
        raise UserError(
            f"optimizer: DeepSpeed wrapped it in {name}, which cannot be resized; allowed are "
            f"{', '.join(n.rsplit('.', 1)[1] for n in ADAPTERS)} and a bare torch optimizer: "
            "set optimizer.implementation=torch_fused, or zero_optimization.stage 1, 2 or 3 in the ds_config"
        )
    adapter = ADAPTERS[name]
    if adapter is ZeroAdapter and getattr(optimizer, "cpu_offload", False):
        adapter = OffloadAdapter
    return adapter(engine)


def _warn_if_untested() -> None:
    import deepspeed  # slow to import, but loaded already, because an engine exists

    if deepspeed.__version__ != DEEPSPEED_TESTED and ranks.rank() == 0:
        warnings.warn(
            f"deepspeed {deepspeed.__version__} is not the version that resizing was tested with ({DEEPSPEED_TESTED}); "
            "its engine passed the self-check, so training continues",
            stacklevel=3,
        )


def _unsupported_structure(engine) -> Iterator[tuple[str, str, str]]:
    """(field, value found, allowed values) of unsupported properties that the JSON alone does not show."""
    if "muon" in type(engine.basic_optimizer).__name__.lower():
        yield "optimizer.type", type(engine.basic_optimizer).__name__, "optimizers with a state per element, as AdamW"
    if engine.has_moe_layers:
        yield "moe", "a model with expert layers", "dense models only"
    if engine.mp_world_size > 1:
        yield "tensor_parallel", f"{engine.mp_world_size} model-parallel ranks", "data parallelism only"


def _unknown_inside(difference: str) -> UserError:
    import deepspeed

    return UserError(
        f"deepspeed {deepspeed.__version__}: its optimizer differs from the one that resizing knows: {difference}; "
        f"install deepspeed=={DEEPSPEED_TESTED}"
    )


def _class_name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
