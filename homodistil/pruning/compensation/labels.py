"""Compensation by the logits of a head of labels: which directions they depend on, and a head that makes up for a cut.

Of a sequence classifier or cross-encoder. B texts of a batch, L labels, C width between the head's linears, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from homodistil.data.batch import Batch
from homodistil.models.backbone import run_backbone
from homodistil.models.classifier import LogitKind
from homodistil.models.family import ModelFamily
from homodistil.pruning.compensation.least_squares import Rows, fit_linear, fit_norm
from homodistil.pruning.compensation.refit import Refit
from homodistil.pruning.compensation.vectors import NUM_DIRECTIONS, drawn_directions, generators


def drawn_logit_directions(batch: Batch, first_sequence: int, seed: int, kind: LogitKind, logits: Tensor) -> Tensor:
    """Directions of logits (B, L) -> fp32 (NUM_DIRECTIONS, B, L), the same however texts are dealt out to
    micro-batches.

    Of categories the gradient of -log p of a label drawn from the model itself, p - onehot: gradients of the logits in
    such directions have, as second moment, the Fisher information, which is the curvature of the KL. Of values standard
    normal ones, for that of half the squared distance.

    Args:
        first_sequence: place of the batch's first text among those of all ranks.
    """
    if kind == "values":
        return drawn_directions(batch, first_sequence, seed, logits.shape[1]).to(logits)
    numbers = torch.stack(
        [torch.rand(NUM_DIRECTIONS, generator=one) for one in generators(batch, first_sequence, seed)]
    )
    return torch.stack([label_direction(logits, column) for column in numbers.T.to(logits).contiguous()])


def label_direction(logits: Tensor, numbers: Tensor) -> Tensor:
    """p - onehot of a label drawn from the logits (B, L), by numbers in [0, 1) (B,); of the shape of `logits`."""
    shares = logits.softmax(-1)
    return shares - functional.one_hot(draw_labels(shares, numbers), shares.shape[1]).to(shares)


def draw_labels(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """A label for each row (rows, V), by its cumulative probability; torch.multinomial draws a number an entry."""
    sums = probabilities.cumsum(-1)
    return torch.searchsorted(sums, numbers.unsqueeze(1).to(sums)).squeeze(1).clamp(max=probabilities.shape[1] - 1)


def refit_labels(refit: Refit) -> None:
    """Fit the head of labels to the old one's, in place: its first linear to what the neurons that stay put out, then
    its norm, then the logits."""
    old, new = (refit.family.classifier(model) for model in (refit.old, refit.new))
    if not (refit.is_affected or refit.changes.touch(old.linear)):
        return
    masks = [stream.batch.attention_mask for stream in refit.streams]
    before, after = (
        [head.rows(side.hidden, mask) for side, mask in zip(sides, masks, strict=True)]
        for head, sides in ((old, [s.old for s in refit.streams]), (new, [s.new for s in refit.streams]))
    )
    put_out = [old.linear(rows) for rows in before]
    wanted = [refit.changes.of_outputs(old.linear, rows) for rows in put_out]
    fit_linear([new.linear], map(Rows, after, wanted), refit.ridge)
    if new.norm is not None:
        of_norm = [refit.changes.of_outputs(old.linear, old.inner(rows)) for rows in put_out]
        fit_norm(new.norm, map(Rows, (new.activation(new.linear(rows)) for rows in after), of_norm), refit.ridge)
    inner = [new.inner(new.linear(rows)) for rows in after]
    fit_linear([new.decoder], map(Rows, inner, (old.decoder(old.inner(rows)) for rows in put_out)), refit.ridge)


@torch.no_grad()
def logit_distance(
    models: tuple[nn.Module, nn.Module], family: ModelFamily, batches: Sequence[Batch], kind: LogitKind
) -> Tensor:
    """Sums over texts of this rank, fp64 (4,), of which `mean_distance` makes one number: how far the logits of two
    models are from each other, and those of the first from 0, both squared or the first one as KL (nats), then the
    first one's own sum, and the number of logits or texts."""
    sums = torch.zeros(4, dtype=torch.float64, device=batches[0].input_ids.device)
    for batch in batches:
        inputs = batch.input_ids, batch.padding_mask, batch.token_types
        before, after = (
            family.classifier(model).logits(run_backbone(model, family, *inputs), batch.attention_mask).double()
            for model in models
        )
        if kind == "categories":
            logs = after.log_softmax(-1), before.log_softmax(-1)
            distance, count = functional.kl_div(*logs, reduction="sum", log_target=True), len(before)
        else:
            distance, count = (after - before).square().sum(), before.numel()
        sums += torch.stack([distance, before.square().sum(), before.sum(), distance.new_tensor(count)])
    return sums


def mean_distance(sums: Tensor, kind: LogitKind) -> float:
    """KL (nats) of a text, or the share of the variance of scores that is lost, of `logit_distance` over all ranks."""
    distance, square, total, count = sums.tolist()
    if kind == "categories":
        return distance / count
    return distance / max(square - total**2 / count, torch.finfo(torch.float32).tiny)
