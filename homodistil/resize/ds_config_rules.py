"""Settings of DeepSpeed's JSON that do not allow resizing, as one table.

`support.check_config` applies it to the JSON before anything is prepared or trained, and `support.check_supported` to
the config of the live engine. The latter also checks what the JSON does not show (expert layers, tensor parallelism).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

_MISSING = object()


class Refusal(NamedTuple):
    field: str
    found: str
    allowed: str
    """The allowed value, and how to fix the setting."""


class _Rule(NamedTuple):
    field: str
    """Dotted path in the JSON."""
    is_allowed: Callable[[object], bool]
    """Called only if the JSON has the field."""
    allowed: str


def _off(value: object) -> bool:
    return not value


def _one(value: object) -> bool:
    return value in (0, 1)


_REMOVE = "false; remove it"
_RULES = [
    _Rule("zero_optimization.stage", lambda stage: stage in (0, 1, 2, 3), "0, 1, 2 or 3; set it to 2"),
    _Rule(
        "zero_optimization.offload_optimizer.device",
        lambda device: device in ("none", "cpu"),
        "'none' or 'cpu'; set it to 'cpu'",
    ),
    _Rule("zero_optimization.offload_optimizer.ratio", lambda ratio: ratio == 1, "1 (all of it); remove it"),
    _Rule("zero_optimization.offload_optimizer.super_offload", _off, _REMOVE),
    _Rule("zero_optimization.offload_param.device", lambda device: device == "none", "'none'; remove the section"),
    _Rule("zero_optimization.cpu_offload", _off, "the section offload_optimizer instead"),
    _Rule("zero_optimization.cpu_offload_param", _off, _REMOVE),
    _Rule("zero_optimization.zenflow", _off, "none; remove the section"),
    _Rule("zero_optimization.zero_hpz_partition_size", _one, "1 (no hpZ); remove it"),
    _Rule("zero_optimization.zero_quantized_weights", _off, _REMOVE),
    _Rule("zero_optimization.zero_quantized_nontrainable_weights", _off, _REMOVE),
    _Rule("zero_optimization.zero_quantized_gradients", _off, _REMOVE),
    _Rule("zero_optimization.mics_shard_size", lambda size: size is None or size < 1, "none (no MiCS); remove it"),
    _Rule("bf16.bf16_master_weights_and_grads", _off, "fp32 masters; remove it"),
    _Rule("bf16.bf16_optimizer_states", _off, "fp32 states; remove it"),
    _Rule("fp16.fp16_master_weights_and_grads", _off, "fp32 masters; remove it"),
    _Rule("torch_autocast.enabled", _off, "false; set bf16.enabled instead"),
    _Rule("amp.enabled", _off, "false; set bf16.enabled instead"),
    _Rule("compile.deepcompile", _off, _REMOVE),
    _Rule("tensor_parallel.autotp_size", _one, "1 (data parallelism only); remove the section"),
    _Rule("sequence_parallel_size", _one, "1 (data parallelism only); remove it"),
    _Rule("expert_parallel.enabled", _off, "false (dense models only); remove the section"),
    _Rule("pipeline", _off, "none (no pipeline); remove the section"),
    _Rule("managed_gradient_accumulation", bool, "true; remove it"),
    _Rule("sparse_gradients", _off, _REMOVE),
    _Rule("optimizer.type", lambda name: "muon" not in str(name).lower(), "optimizers with a state per element: AdamW"),
]


def refusals(config: Mapping) -> Iterator[Refusal]:
    """All settings of DeepSpeed's JSON that do not allow resizing."""
    for rule in _RULES:
        value = _look_up(config, rule.field)
        if value is not _MISSING and not rule.is_allowed(value):
            actual = "a section" if isinstance(value, Mapping) else _as_json(value)
            yield Refusal(rule.field, actual, rule.allowed)
    yield from _wrong_together(config)


def _wrong_together(config: Mapping) -> Iterator[Refusal]:
    stage = _look_up(config, "zero_optimization.stage", 0)
    low_precision = next((name for name in ("bf16", "fp16") if _look_up(config, f"{name}.enabled", False)), None)
    accumulation = _look_up(config, "data_types.grad_accum_dtype", None)
    if accumulation not in (None, low_precision or "fp32") and not (low_precision and stage and accumulation == "fp32"):
        allowed = f"'{low_precision}', or 'fp32' at stages 1 to 3" if low_precision else "'fp32'"
        yield Refusal("data_types.grad_accum_dtype", _as_json(accumulation), f"{allowed}; remove it")
    if offloads_optimizer(config):
        if stage == 0:
            yield Refusal("zero_optimization.offload_optimizer.device", "'cpu' at stage 0", "it at stages 1 to 3")
        pins = _look_up(config, "zero_optimization.offload_optimizer.pin_memory", True)
        backend = os.environ.get("DS_PIN_MEMORY_BACKEND", "torch").strip().lower()
        if pins and backend == "native":
            allowed = "torch's pinned memory; unset DS_PIN_MEMORY_BACKEND, or set it to false"
            yield Refusal(
                "zero_optimization.offload_optimizer.pin_memory", "true with DS_PIN_MEMORY_BACKEND=native", allowed
            )


def offloads_optimizer(config: Mapping) -> bool:
    """Whether DeepSpeed's JSON keeps master weights and optimizer state in host memory."""
    return _look_up(config, "zero_optimization.offload_optimizer.device", "none") == "cpu"


def _look_up(config: Mapping, field: str, default: object = _MISSING) -> object:
    value: object = config
    for name in field.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return default
        value = value[name]
    return value


def _as_json(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
