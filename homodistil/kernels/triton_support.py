"""Where Triton can run, which form of an operation to take, and what its CPU interpreter needs to be right.

Every operation of this room calls `use_triton` before it imports its kernels; every `*_triton.py` file calls
`mend_interpreter` after it has imported triton.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from homodistil.errors import UserError

IMPLEMENTATIONS = ("auto", "torch", "triton")
"""auto: Triton for tensors on a GPU where triton is installed, plain torch elsewhere."""

SMALLEST_DOT = 16
"""Least extent of a tile that Triton's dot product takes."""


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """TRITON_INTERPRET is set: kernels run in Python on CPU tensors. For tests; thousands of times slower than torch.

    Triton reads the variable when it is imported and when a kernel is defined: a process knows one mode.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def triton_available(tensor_device: torch.device) -> bool:
    """Whether Triton kernels can work on tensors of this device."""
    return triton_installed() and (tensor_device.type == "cuda" or interpreted())


def use_triton(implementation: str, tensor_device: torch.device) -> bool:
    """Whether to take the Triton form of an operation.

    Args:
        implementation: "auto", "torch" or "triton" (the field loss.kernels).

    Raises:
        UserError: another name, or "triton" where it cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"loss.kernels: {implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "triton" and not triton_available(tensor_device):
        missing = "package triton is not installed" if not triton_installed() else f"tensors are on {tensor_device}"
        raise UserError(
            f"loss.kernels: 'triton' was asked for, but {missing}; set it to auto or torch, or run on an NVIDIA GPU "
            f"with triton installed (TRITON_INTERPRET=1 runs the kernels on a CPU, for tests)"
        )
    if implementation == "auto":
        return tensor_device.type == "cuda" and triton_installed()
    return implementation == "triton"


def padded(size: int, at_least: int = SMALLEST_DOT) -> int:
    """The power of two that holds `size`: extents of tiles are powers of two."""
    return max(at_least, 1 << (size - 1).bit_length())


def mend_interpreter() -> None:
    """Mend two faults of Triton's interpreter; does nothing where kernels are compiled.

    tl.dot of bf16 multiplies raw bit patterns (triton 3.6 to 3.9; every other bf16 arithmetic is as wrong: kernels cast
    to fp32 right after tl.load for all but operands of dot), and range() over a runtime scalar fails with numpy >= 2.4
    (triton 3.6).
    """
    if not interpreted():
        return
    from triton.runtime import interpreter

    _mend_dot(interpreter)
    _mend_index(interpreter)


def _mend_dot(interpreter) -> None:
    import numpy as np
    import triton.language as tl

    builder = interpreter.InterpreterBuilder
    if hasattr(builder.create_dot, "mended"):
        return
    broken = builder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, *others):
        return broken(self, widened(a), widened(b), *others)

    create_dot.mended = True
    builder.create_dot = create_dot


def _mend_index(interpreter) -> None:
    broken = interpreter._patch_lang_tensor
    if hasattr(broken, "mended"):
        return

    def patch_lang_tensor(tensor, *scope):
        broken(tensor, *scope)
        # A scalar is an array of one element, which numpy >= 2.4 no longer turns into an int.
        tensor.__index__ = lambda self: self.handle.data.item()

    patch_lang_tensor.mended = True
    interpreter._patch_lang_tensor = patch_lang_tensor
