"""Peak FLOP/s of a device for matrix products, from its datasheet or measured: the denominator of the MFU."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PeakFlops:
    """Peak of the device of one rank, and the source of the number, which is shown with every MFU."""

    flops_per_s: float
    source: str


# Dense FLOP/s of tensor cores with fp32 accumulation, from NVIDIA's datasheets (half of the number with sparsity where
# only this is given). The patterns match full names, so that laptop and MIG variants do not match.
_T = 1e12


_SXM_HOPPER = {"half": 989.4 * _T, "tf32": 494.7 * _T, "fp32": 66.9 * _T}


_NVL_HOPPER = {"half": 835.5 * _T, "tf32": 417.5 * _T, "fp32": 60 * _T}


_DATASHEET = {
    r"A100[- ](SXM4|PCIE|PCIe).*|A100 80GB PCIe": {"half": 312 * _T, "tf32": 156 * _T, "fp32": 19.5 * _T},
    r"H100( 80GB HBM3| SXM5.*)": _SXM_HOPPER,
    r"H100 PCIe": {"half": 756 * _T, "tf32": 378 * _T, "fp32": 51 * _T},
    r"H100 NVL": _NVL_HOPPER,
    r"H200": _SXM_HOPPER,
    r"H200 NVL": _NVL_HOPPER,
    r"L40S": {"half": 362 * _T, "tf32": 183 * _T, "fp32": 91.6 * _T},
    r"A10": {"half": 125 * _T, "tf32": 62.5 * _T, "fp32": 31.2 * _T},
    r"V100-SXM2.*": {"fp16": 125 * _T, "fp32": 15.7 * _T},
    r"V100-PCI[Ee].*": {"fp16": 112 * _T, "fp32": 14 * _T},
    r"GeForce RTX 4090": {"half": 165.2 * _T, "tf32": 82.6 * _T, "fp32": 82.6 * _T},
}


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> PeakFlops:
    """Peak of one device for matrix products in `dtype`.

    For a GPU whose name is listed, this is the dense number of the datasheet. For any other device it is measured: the
    best of a few large products with the threads of this rank (about a tenth of a second). The MFU of a CPU thus
    compares a training step with a plain GEMM.
    """
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = datasheet_flops(name, _format_name(dtype))
        if known is not None:
            return PeakFlops(known, f"datasheet, {name}, {_format_name(dtype)} dense")
        return PeakFlops(_measured(device, dtype), f"measured GEMM, {name}, {_short(dtype)}")
    threads = torch.get_num_threads()
    plural = "s" if threads > 1 else ""
    return PeakFlops(_measured(device, dtype), f"measured GEMM, CPU, {_short(dtype)}, {threads} thread{plural}")


def datasheet_flops(device_name: str, number_format: str) -> float | None:
    """Dense FLOP/s of the GPU that the driver calls `device_name`; None if the GPU or the format is not listed.

    Args:
        number_format: "bf16", "fp16", "tf32" or "fp32".
    """
    name = re.sub(r"^(NVIDIA|Tesla) ", "", device_name)
    if "MIG" in name:
        return None
    for pattern, numbers in _DATASHEET.items():
        if re.fullmatch(pattern, name):
            both_halves = numbers.get("half") if number_format in ("bf16", "fp16") else None
            return numbers.get(number_format, both_halves)
    return None


def _format_name(dtype: torch.dtype) -> str:
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else _short(dtype)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, str(dtype))


def _measured(device: torch.device, dtype: torch.dtype, budget_s: float = 0.1) -> float:
    """Best FLOP/s of square products; the size is doubled until one product takes 1/50 of the budget."""
    # Random values, because the GPU clocks higher with constant ones; a local generator keeps the global state.
    generator = torch.Generator(device).manual_seed(0)
    size, best, start = 256, 0.0, time.perf_counter()
    spent = seconds = 0.0
    while spent < budget_s:
        if seconds < budget_s / 50 and size < 8192:
            size *= 2
            left, right = (_random_square(size, dtype, generator) for _ in range(2))
            _time_product(left, right)  # warm-up: thread pool, kernel choice, page faults
        seconds = _time_product(left, right)
        best = max(best, 2 * size**3 / seconds)
        spent = time.perf_counter() - start
    return best


def _random_square(size: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(size, size, generator=generator, device=generator.device).to(dtype)


def _time_product(left: torch.Tensor, right: torch.Tensor) -> float:
    _wait(left.device)
    start = time.perf_counter()
    torch.mm(left, right)
    _wait(left.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
