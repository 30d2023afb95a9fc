"""Random state of a rank: saved, restored, or derived for a rank that did not exist when it was saved.

Data order and masks do not depend on it (data/loader.py); dropout does.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """Copies of torch's generator states, uint8."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(path: Path, seed: int, rank: int, step: int) -> None:
    """Go on with the state in `path`; where it has none for this rank or device, with one of its own.

    Args:
        seed, rank, step: what a new state depends on.
    """
    text = f"{seed}/{rank}/{step}"
    torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))  # all devices
    if not path.is_file():
        return
    state = load_file(path)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
