"""The learning rate of a run whose user has set none: by the width that the student ends with."""

from __future__ import annotations

RATE_TIMES_WIDTH = 0.192
"""Learning rate times hidden size, of encoders: 3e-3 at 64, 1e-3 at 192, 5e-4 at 384. The best rates that we have
measured, of students between 32 and 384 wide, are within a factor of two of it (LOG.md, 2026-12-01)."""
DECODERS_SHARE = 0.25
"""Of it, for decoders, whose best rates are lower (the same table)."""


def rate_of_width(hidden_size: int, is_causal: bool) -> float:
    """Peak learning rate of a student that ends with this hidden size, to two digits."""
    share = DECODERS_SHARE if is_causal else 1.0
    return float(f"{share * RATE_TIMES_WIDTH / hidden_size:.2g}")
