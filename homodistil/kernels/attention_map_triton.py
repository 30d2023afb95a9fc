"""Launches the Triton kernels of the attention-map loss, attention_map_kernels_triton.py, and says how to compile them.

Tensors go in as they are, with strides: Hugging Face hands out (B, N, T, H) as views of (B, T, N, H), where the dims of
a head still lie side by side. A row of a head fills whole memory sectors either way: a contiguous copy would be cost
without gain.

Numbers that change from batch to batch or with pruning (tokens, heads, dims) are run-time arguments, so a resize
compiles nothing until a head's dims pass a power of two (or stop being a multiple of 16). The kind of mask is compiled
in, and left out where a text is too short for its window to hide anything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from homodistil.kernels import attention_map_kernels_triton as kernels
from homodistil.kernels.attention_map_blocks_triton import Side
from homodistil.kernels.attention_map_inputs import SCORE_TARGETS, Gradients, Maps
from homodistil.kernels.triton_support import padded

FP16_SHIFT = 1024.0
"""The gradient of a probability near the teacher's is below what fp16 holds: it enters the product this much larger."""

MOST_REGISTERS = 255
"""That a thread may have."""


class Launch(NamedTuple):
    """How a kernel is compiled for a shape."""

    constexprs: dict[str, int]
    """Extents of its tiles."""
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    """Of a thread. None: ptxas may spill a few to have another program on the multiprocessor."""


def configuration(
    num_tokens: int,
    student_dims: int,
    teacher_dims: int,
    in_fp32: bool = False,
    capability: int = 90,
    shared_keys: bool = False,
    masked: bool = False,
) -> dict[str, Launch]:
    """The kernels that run for these shapes, by name, and how. None spills registers (test_compile_ahead.py), but
    for up to 64 bytes a thread of some in fp32.

    Args:
        in_fp32: one of the models computes in fp32. Such products run without tensor cores, from registers alone.
        capability: of the GPU, 80 for A100, 90 for H100 and H200. Before 90 both operands and results of a product take
            up registers: smaller tiles.
        shared_keys: heads of queries of the student share keys: dK is a sum over several programs of
            `tile_kernel`, so the others run.
        masked: queries do not see all keys.
    """
    dims = {"STUDENT_DIMS": padded(student_dims), "TEACHER_DIMS": padded(teacher_dims)}
    max_registers = MOST_REGISTERS if shared_keys or masked else None
    if in_fp32:
        # A limit on registers makes these spill more, not less.
        launch = Launch(dims | {"QUERIES": 32, "KEYS": 32}, num_warps=8, num_stages=2)
        return {"row_kernel": launch, "column_kernel": launch}
    if not shared_keys and num_tokens <= (128 if capability >= 90 else 64):
        tokens = padded(num_tokens)
        return {"tile_kernel": Launch(dims | {"TOKENS": tokens}, 8 if tokens == 128 else 4, 1, max_registers)}
    return _in_blocks(dims, capability, max_registers)


def _in_blocks(dims: dict[str, int], capability: int, max_registers: int | None) -> dict[str, Launch]:
    """The kernels of a text that is too long for one tile."""
    narrow = dims | {"QUERIES": 64, "KEYS": 32}
    if capability >= 90 and max(dims.values()) > 64:
        launch = Launch(narrow, 4, 1, MOST_REGISTERS)
        return {"row_kernel": launch, "column_kernel": launch}
    queries, num_stages = (64, 2) if capability >= 90 else (32, 1)
    # Before 90 ptxas is told so always: left alone it stops at 128 registers, and centred scores spill 16 bytes.
    most_registers = max_registers if capability >= 90 else MOST_REGISTERS
    rows = Launch(dims | {"QUERIES": queries, "KEYS": 64}, 4, num_stages, most_registers)
    # A program's keys stay in registers: beside a mask, or a loop over heads, there is room for half as many.
    columns = rows._replace(constexprs=narrow) if max_registers else rows
    return {"row_kernel": rows, "column_kernel": columns}


def options(target: str, student_dtype: torch.dtype) -> dict[str, str | float]:
    """The constexprs that do not follow from shapes."""
    # Differences of scores are not bounded as those of probabilities are: larger, they could overflow fp16.
    shift = FP16_SHIFT if student_dtype == torch.float16 and target not in SCORE_TARGETS else 1.0
    return {"TARGET": target, "SHIFT": shift}


def evaluate(maps: Maps, with_gradients: bool) -> tuple[Tensor, Gradients | None]:
    """Sum over heads of the loss, and the gradients of that sum."""
    num_texts, num_heads, num_tokens, student_dims = maps.student_queries.shape
    capability = _capability(maps.student_queries.device)
    in_fp32 = torch.float32 in (maps.student_queries.dtype, maps.teacher_queries.dtype)
    shared_keys, masked = maps.student_group > 1, maps.kind.within(num_tokens) != (None, None)
    launches = configuration(
        num_tokens, student_dims, maps.teacher_queries.shape[-1], in_fp32, capability, shared_keys, masked
    )
    gradients = maps.gradient_buffers() if with_gradients else None
    arguments = _arguments(maps, gradients)
    if "tile_kernel" in launches:
        losses = _launch("tile_kernel", launches, arguments, num_heads, num_tokens)
        return losses.sum(), gradients
    arguments["row_sums"] = maps.student_queries.new_empty(num_texts * num_heads * 3 * num_tokens, dtype=torch.float32)
    losses = _launch("row_kernel", launches, arguments, num_heads, launches["row_kernel"].constexprs["QUERIES"])
    if with_gradients:
        num_key_heads = maps.student_keys.shape[1]
        _launch("column_kernel", launches, arguments, num_key_heads, launches["column_kernel"].constexprs["KEYS"])
    return losses.sum(), gradients


def _capability(device: torch.device) -> int:
    """90 where kernels are interpreted."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _launch(name: str, launches: dict[str, Launch], arguments: dict, num_heads: int, block: int) -> Tensor | None:
    """One program for `block` tokens of each of `num_heads` heads of a text. Returns the losses of the programs."""
    launch, mask = launches[name], arguments["attention_mask"]
    num_programs = mask.shape[0] * num_heads * triton.cdiv(mask.shape[1], block)
    losses = None if name == "column_kernel" else torch.empty(num_programs, device=mask.device)
    outputs = {} if losses is None else {"losses": losses}
    kernel = getattr(kernels, name)
    kernel[(num_programs,)](
        **arguments,
        **outputs,
        **launch.constexprs,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        maxnreg=launch.max_registers,
    )
    return losses


def _arguments(maps: Maps, gradients: Gradients | None) -> dict:
    """What all kernels take."""
    num_heads, num_tokens = maps.student_queries.shape[1:3]
    before, after = maps.kind.within(num_tokens)
    return {
        "student": _side(maps.student_queries, maps.student_keys),
        "teacher": _side(maps.teacher_queries, maps.teacher_keys),
        "gradients": Side() if gradients is None else _side(*gradients),
        "attention_mask": maps.attention_mask.contiguous(),
        "heads": maps.heads,
        "student_scale": maps.student_scale,
        "teacher_scale": maps.teacher_scale,
        "num_heads": num_heads,
        "num_tokens": num_tokens,
        "BEFORE": before,
        "AFTER": after,
        **options(maps.target, maps.student_queries.dtype),
    }


def _side(queries: Tensor, keys: Tensor) -> Side:
    """The dims of a head lie side by side; keys that are not shared have the strides of their queries. Anything else is
    copied.
    """
    group = queries.shape[1] // keys.shape[1]
    if queries.stride(-1) != 1 or keys.stride(-1) != 1 or (group == 1 and queries.stride() != keys.stride()):
        queries, keys = queries.contiguous(), keys.contiguous()
    shared = () if group == 1 else (group, *keys.stride()[:3])
    return Side(queries, keys, *queries.stride()[:3], queries.shape[-1], *shared)
