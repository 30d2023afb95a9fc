"""Memory of this rank: what it has now, its peak, and the bytes that live tensors account for."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

STRICT_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Environment for glibc: freed blocks go back to the system at once, so that the resident set is what is in use."""
NO_SHAPE_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "MKL_DISABLE_FAST_MM": "1"}
"""Environment for oneDNN and MKL, which else keep code and buffers for every shape that a matrix product has met."""


def memory_in_use(device: torch.device) -> int:
    """Bytes: the process's resident set on the CPU, what the allocator has handed out on an accelerator."""
    if device.type != "cpu":
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)  # glibc: give back the free pages between blocks that are in use
    return _status_bytes("VmRSS")


def start_peak(device: torch.device) -> None:
    """`peak_memory` counts from here on."""
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    return _status_bytes("VmHWM") if device.type == "cpu" else torch.cuda.max_memory_allocated(device)


def live_tensor_bytes(device: torch.device) -> int:
    """Bytes of all storages that tensors of this process hold, each once."""
    if device.type != "cpu":
        return torch.cuda.memory_allocated(device)
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu" and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
