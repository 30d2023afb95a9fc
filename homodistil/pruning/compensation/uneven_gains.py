"""Residual dims that must stay coordinates because of a gain that cannot be folded: the final norm's, of a tied head.

Behind a projection a gain becomes the diagonal of P' diag(gain) P, its mean over the dims that are mixed. Few dims with
another gain than most, often of the other sign, can carry a third of what enters the decoder: SmolLM2-135M has one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from homodistil.models.norms import Norm
from homodistil.pruning.compensation.moments import TINY, Moments

TOLERATED = 0.01
"""Share of what the norm puts out that mixing may lose."""
_MOST = 0.1
"""Share of all dims that are fixed at most: where gains differ everywhere, fixing few of them does not help."""


def uneven_dims(norm: Norm, outputs: Moments, most: int) -> Tensor:
    """Dims that stay coordinates, int64, ascending; none where all gains are alike.

    Dims are taken out, the one that loses most first, until the rest may be mixed.

    Args:
        outputs: moments of what `norm` puts out, (D + 1, D + 1).
        most: dims that there is room for.
    """
    gain, energy = norm.gain.to(outputs.sums.device), standardised_energy(norm, outputs)
    limit = TOLERATED * (gain.square() * energy).sum()
    mixed = torch.ones_like(gain, dtype=torch.bool)
    for _ in range(min(most, int(_MOST * len(gain)))):
        mean = (gain * energy)[mixed].sum() / energy[mixed].sum().clamp(min=TINY)
        lost = (gain - mean).square() * energy * mixed
        if lost.sum() <= limit:
            break
        mixed[lost.argmax()] = False
    return (~mixed).nonzero().squeeze(1)


def standardised_energy(norm: Norm, outputs: Moments) -> Tensor:
    """E[z^2] of each dim before the gain, fp64 (D,)."""
    second, mean = outputs.second.diagonal(), outputs.mean
    if norm.shift is not None:
        shift = norm.shift.to(second.device)
        second = second - 2 * shift * mean + shift.square()
    return second / norm.gain.to(second.device).square().clamp(min=TINY)
