"""Tests that need an NVIDIA GPU: marker `gpu`, skipped elsewhere, run by benchmarks/gpu_suite.py.

HOMODISTIL_REHEARSE_GPU_TESTS=1 runs on the CPU what of them can run there, to find mistakes in the tests themselves.
"""

from __future__ import annotations

import os

import pytest
import torch

REHEARSAL = "HOMODISTIL_REHEARSE_GPU_TESTS"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU; the CPU in a rehearsal."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get(REHEARSAL):
        return torch.device("cpu")
    pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="session")
def gpu(device) -> torch.device:
    """For what has no meaning on a CPU."""
    if device.type != "cuda":
        pytest.skip("needs an NVIDIA GPU")
    return device
