"""What every compensated event does: the old network stands still, and all of the new one is fitted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from homodistil.pruning.compensation.head import can_straighten, refit_head, straighten_head
from homodistil.pruning.compensation.labels import refit_labels
from homodistil.pruning.compensation.refit import Refit


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """`model` without dropout and gradients of its own inside, and as it was afterwards."""
    training = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
        for parameter in trained:
            parameter.requires_grad_(True)


@torch.no_grad()
def refit_network(refit: Refit, decoder_gram: Tensor | None) -> float:
    """Fit the whole of the new network. Returns the share that `Compensated.report` calls lost.

    Args:
        decoder_gram: where the residual stream has been projected, for the vocabulary head.
    """
    refit.run()
    lost = refit.lost()
    if refit.family.has_classifier(refit.new):
        refit_labels(refit)
        return lost
    head = refit.family.head_parts(refit.new) if refit.family.has_head(refit.new) else None
    if head is None:
        return lost
    if decoder_gram is not None and can_straighten(head):
        straighten_head(refit, decoder_gram)
    elif refit.is_affected:
        refit_head(refit)
    return lost
