"""Random state of a rank: saved, restored, or derived for a rank that the saving run did not have.

Dropout depends on it; the order of the data and the masks do not (data/loader.py).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """Copies of the states of torch's generators on the CPU and the current GPU (uint8)."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def seed_random_state(seed: int, rank: int, step: int) -> None:
    """Seed torch's generators on all devices by a function of these: each rank's dropout is its own, and repeatable."""
    text = f"{seed}/{rank}/{step}"
    torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))


def restore_random_state(path: Path, seed: int, rank: int, step: int) -> None:
    """Restore the state in `path`. If it has none for this rank or device, seed the generator with a new state.

    Args:
        path: file of `random_state` for this rank; need not exist.
        seed, rank, step: see `seed_random_state`.
    """
    seed_random_state(seed, rank, step)
    if not path.is_file():
        return
    state = load_file(path)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
