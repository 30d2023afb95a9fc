"""Which layers a model misses least: block influence (ShortGPT, arXiv 2403.03853, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from homodistil.data.batch import Batch
from homodistil.distributed import ranks
from homodistil.models.activations import ActivationVisitor, LayerActivations


@torch.no_grad()
def block_influence(
    show: Callable[[Batch, ActivationVisitor], object], num_layers: int, batches: Iterable[Batch]
) -> list[float]:
    """1 - cosine of what goes into each layer and what comes out of it, mean over valid tokens: 0, it changes nothing.

    Every rank calls it, with batches of its own; the result is the same on all ranks.

    Args:
        show: runs a model in evaluation mode on a batch, and shows its activations (`Student.show`).
    """
    meter, device = _Meter(), torch.device("cpu")
    sums = torch.zeros(num_layers + 1, dtype=torch.float64)
    for batch in batches:
        meter.turned.clear()
        show(batch, meter)
        valid, device = batch.attention_mask.bool(), batch.attention_mask.device
        sums[:-1] += torch.stack([turned[valid].double().sum() for turned in meter.turned]).cpu()
        sums[-1] += int(valid.sum())
    sums = ranks.total(sums.to(device)).cpu()
    return (sums[:-1] / sums[-1]).tolist()


class _Meter(ActivationVisitor):
    """1 - cosine of the input and the output of every layer of one pass, (B, T) each, in order."""

    def __init__(self) -> None:
        self.turned: list[Tensor] = []
        self._before: Tensor | None = None

    def embedding(self, output: Tensor) -> None:
        self._before = output

    def layer(self, i: int, tap: LayerActivations) -> None:
        self.turned.append(1 - cosine_similarity(self._before.float(), tap.hidden.float(), dim=-1))
        self._before = tap.hidden


def most_influential(
    influence: Sequence[float], num_layers: int, candidates: Collection[int] | None = None
) -> list[int]:
    """The layers that stay, ascending; of equal ones the first.

    Args:
        num_layers: how many stay.
        candidates: layers that may leave; None: all. At least as many as are to leave.
    """
    may_leave = range(len(influence)) if candidates is None else candidates
    ranked = sorted(range(len(influence)), key=lambda i: (i in may_leave, -influence[i], i))
    return sorted(ranked[:num_layers])
