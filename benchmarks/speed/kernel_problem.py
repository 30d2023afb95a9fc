"""What an operation is compared on (`Problem`): inputs, variants, FLOPs and bytes; and what all operations share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Variant = Callable[[Inputs], Tensor]


@dataclass
class Problem:
    operation: str
    shape: str
    make: Callable[[torch.device, torch.dtype], Inputs]
    leaves: tuple[str, ...]
    """Inputs that get a gradient."""
    variants: dict[str, Variant]
    flops: float
    elements: float
    """Least numbers to move, in units of the dtype."""
    notes: dict[str, str] = field(default_factory=dict)


def implementations(device: torch.device) -> list[str]:
    """Of homodistil's own operations, those that can run here."""
    return ["torch", "triton"] if device.type == "cuda" else ["torch"]


def homodistil_variants(variant_of: Callable[[str], Variant], device: torch.device) -> dict[str, Variant]:
    return {f"homodistil {name}": variant_of(name) for name in implementations(device)}


def randn(*shape: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype)
