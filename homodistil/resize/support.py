"""Which engines can be resized: the check at start, and the choice of adapter.

Resizing rewrites private fields of DeepSpeed. So an engine is accepted only when its version, configuration, wrapper
class, fields and memory layout are all ones known to work; anything else is an error at start that names what differs,
never silent corruption later.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping

import torch

from homodistil import ranks
from homodistil.errors import UserError
from homodistil.resize.adapter import Adapter
from homodistil.resize.plain import PlainAdapter, UnfusedAdapter
from homodistil.resize.self_check import try_resize
from homodistil.resize.zero import ZeroAdapter

DEEPSPEED_TESTED = "0.19.8"

# Exact classes: a subclass (ZenFlow, SuperOffload, pipeline, hybrid engine) keeps other books.
ENGINE_CLASS = "deepspeed.runtime.engine.DeepSpeedEngine"
ADAPTERS: dict[str, type[Adapter]] = {
    "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer": UnfusedAdapter,
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": ZeroAdapter,
}


_STAGES = "0, 1 or 2 (3 comes later); set it to 2"
_NO_OFFLOAD = "'none' (offload comes later)"
_NO_FP16 = "bf16 or fp32 (fp16 comes later); set bf16.enabled instead"


@torch.no_grad()
def check_supported(engine) -> None:
    """Raise `UserError` unless `engine` (a DeepSpeed engine) can be resized. Every rank calls it, before training.

    An untested version of DeepSpeed is let in, with a warning, when everything that is looked at is as expected.
    """
    for field, found, allowed in _unsupported_settings(engine):
        raise UserError(f"ds_config {field}: found {found}; resizing allows {allowed}")
    adapter = adapter_of(engine)
    for field, expected in adapter.fields.items():
        value = getattr(adapter.optimizer, field, None)
        if not isinstance(value, expected):
            found = f"a {type(value).__name__}" if hasattr(adapter.optimizer, field) else "nothing"
            raise _unknown_inside(f"{_class_name(adapter.optimizer)}.{field}: found {found}, not a {expected.__name__}")
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
    """The settings that a ds_config alone shows to be in the way: refused before anything is prepared or trained."""
    zero = engine_config.get("zero_optimization", {})
    refused = [("zero_optimization.stage", zero.get("stage", 0), zero.get("stage", 0) > 2, _STAGES)]
    for field in ("offload_optimizer", "offload_param"):
        device = (zero.get(field) or {}).get("device", "none")
        refused.append((f"zero_optimization.{field}.device", repr(device), device != "none", _NO_OFFLOAD))
    fp16 = bool(engine_config.get("fp16", {}).get("enabled", False))
    refused.append(("fp16.enabled", "true", fp16, _NO_FP16))
    for field, found, is_refused, allowed in refused:
        if is_refused:
            raise UserError(f"ds_config {field}: found {found}; resizing allows {allowed}")


def adapter_of(engine) -> Adapter:
    """The adapter for the engine's optimizer wrapper. Raises `UserError` for a class that none is known for."""
    if _class_name(engine) != ENGINE_CLASS:
        raise UserError(f"engine: found {_class_name(engine)}, resizing allows {ENGINE_CLASS} only")
    optimizer = engine.optimizer
    # A torch optimizer is the engine's own only at stage 0 in fp32.
    if isinstance(optimizer, torch.optim.Optimizer):
        return PlainAdapter(engine)
    name = _class_name(optimizer)
    if name not in ADAPTERS:
        raise UserError(
            f"optimizer: DeepSpeed wrapped it in {name}, which cannot be resized; allowed are "
            f"{', '.join(n.rsplit('.', 1)[1] for n in ADAPTERS)} and a bare torch optimizer: "
            "set optimizer.implementation=torch_fused, or zero_optimization.stage 1 or 2 in the ds_config"
        )
    return ADAPTERS[name](engine)


def _warn_if_untested() -> None:
    import deepspeed  # heavy; an engine exists, so it is loaded already

    if deepspeed.__version__ != DEEPSPEED_TESTED and ranks.rank() == 0:
        warnings.warn(
            f"deepspeed {deepspeed.__version__} is not the version that resizing was tested with ({DEEPSPEED_TESTED}); "
            "its engine passed the self-check, so training goes on",
            stacklevel=3,
        )


def _unsupported_settings(engine) -> Iterator[tuple[str, str, str]]:
    """(field of the ds_config, what was found, what is allowed and how to mend it), for every setting in the way."""
    stage = int(engine.zero_optimization_stage())
    if stage > 2:
        yield "zero_optimization.stage", str(stage), _STAGES
    for field, offload in (
        ("offload_optimizer", engine.zero_offload_optimizer()),
        ("offload_param", engine.zero_offload_param()),
    ):
        if offload is not None and offload.device != "none":
            yield (
                f"zero_optimization.{field}.device",
                repr(str(offload.device)),
                "'none' (offload comes later); remove the section",
            )
    if engine.zenflow_config() is not None:
        yield "zero_optimization.zenflow", "a ZenFlow section", "none; remove it"
    if engine.fp16_enabled():
        yield "fp16.enabled", "true", _NO_FP16
    if engine.bf16_master_weights_and_gradients() or engine.bf16_optimizer_states():
        yield "bf16", "masters or optimizer states in bf16", "fp32 masters and states; remove bf16_* settings"
    if engine.torch_autocast_enabled():
        yield "torch_autocast.enabled", "true", "false; set bf16.enabled instead"
    model_dtype, accumulation_dtype = engine.get_data_types()
    if model_dtype != accumulation_dtype:
        found = f"{accumulation_dtype} for a {model_dtype} model"
        yield "data_types.grad_accum_dtype", found, "the model's own type (fp32 comes later); remove it"
    yield from _unsupported_structure(engine)


def _unsupported_structure(engine) -> Iterator[tuple[str, str, str]]:
    if not engine.managed_gradient_accumulation():
        yield "managed_gradient_accumulation", "false", "true; remove it"
    if "muon" in type(engine.basic_optimizer).__name__.lower():
        yield "optimizer.type", type(engine.basic_optimizer).__name__, "optimizers with a state per element, as AdamW"
    if engine.has_moe_layers:
        yield "moe", "a model with expert layers", "dense models only"
    if engine.mp_world_size > 1:
        yield "tensor_parallel", f"{engine.mp_world_size} model-parallel ranks", "data parallelism only"
    if engine.is_deepcompile_enabled():
        yield "compile.deepcompile", "true", "false; remove it"


def _unknown_inside(difference: str) -> UserError:
    import deepspeed

    return UserError(
        f"deepspeed {deepspeed.__version__}: its optimizer differs from the one that resizing knows: {difference}; "
        f"install deepspeed=={DEEPSPEED_TESTED}"
    )


def _class_name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
