"""Reads entries of DeepSpeed's JSON: ZeRO stage, precision, offload, dtype of accumulated gradients.

    zero_stage(engine_config)        # 0 .. 3
    student_dtype(engine_config)     # dtype of the weights in training

All functions accept the JSON as the user wrote it, and also the result of `build.resolve_engine_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from homodistil.errors import UserError
from homodistil.resize.ds_config_rules import offloads_optimizer

__all__ = [
    "EngineConfig",
    "accumulation_dtype",
    "is_enabled",
    "offloads_optimizer",
    "student_dtype",
    "teacher_dtype",
    "zero_section",
    "zero_stage",
]

EngineConfig = Mapping[str, Any]

_ACCUMULATION_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def zero_section(engine_config: EngineConfig) -> Mapping[str, Any]:
    """The section `zero_optimization`; empty if it is missing."""
    return engine_config.get("zero_optimization") or {}


def zero_stage(engine_config: EngineConfig) -> int:
    """ZeRO stage, 0 .. 3. DeepSpeed's default is 0, which partitions nothing."""
    return zero_section(engine_config).get("stage", 0)


def is_enabled(engine_config: EngineConfig, section: str) -> bool:
    """Whether `section` (such as "bf16") exists and has `enabled: true`."""
    return bool(engine_config.get(section, {}).get("enabled", False))


def student_dtype(engine_config: EngineConfig) -> torch.dtype:
    """Precision that the engine trains in: bfloat16, float16 or float32."""
    if is_enabled(engine_config, "bf16"):
        return torch.bfloat16
    return torch.float16 if is_enabled(engine_config, "fp16") else torch.float32


def accumulation_dtype(engine_config: EngineConfig) -> torch.dtype:
    """Precision in which the gradients of micro-batches are summed; by default the one of the student."""
    name = (engine_config.get("data_types") or {}).get("grad_accum_dtype")
    return _ACCUMULATION_DTYPES.get(name, student_dtype(engine_config))


def teacher_dtype(name: str, engine_config: EngineConfig, device: torch.device) -> torch.dtype:
    """`teacher.dtype` as a torch dtype. "auto" is float16 on GPU, and the student's precision on CPU.

    Raises:
        UserError: float16 on a CPU.
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else student_dtype(engine_config)
    if name == "float16" and device.type == "cpu":
        raise UserError("teacher.dtype: float16 needs a GPU; on CPU use bfloat16, float32 or auto")
    return getattr(torch, name)
