"""How models are timed, apart from what times them: the command line reads this before torch is imported."""

from __future__ import annotations

from typing import NamedTuple


class Conditions(NamedTuple):
    """Of every number in a table of latencies."""

    tokens: int = 32
    """Of a sentence."""
    threads: int = 1
    """Of torch and onnxruntime."""
    rounds: int = 15
    """Timed passes of every model."""
