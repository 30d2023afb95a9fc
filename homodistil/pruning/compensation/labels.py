"""Compensation by the logits of a head of labels: which directions they depend on, and a head that makes up for a cut.

Of a sequence classifier or cross-encoder, or a token classifier. B texts of a batch, T tokens, R rows that the head
reads (one of each text, or its tokens), L labels, C width between the head's linears, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from homodistil.data.batch import Batch
from homodistil.models.backbone import run_backbone
from homodistil.models.classifier import Classifier, LogitKind
from homodistil.models.family import ModelFamily
from homodistil.pruning.compensation.label_draws import NUMBERS, label_direction
from homodistil.pruning.compensation.least_squares import Rows, fit_linear, fit_norm
from homodistil.pruning.compensation.refit import Refit
from homodistil.pruning.compensation.vectors import generators


def drawn_logit_directions(
    batch: Batch, first_sequence: int, seed: int, kind: LogitKind, logits: Tensor, num_directions: int | None
) -> Tensor:
    """Directions of logits (R, L) -> fp32 (draws, R, L), the same however texts are dealt out to micro-batches.

    Of categories the gradient of -log p of a label drawn from the model itself, p - onehot: gradients of the logits in
    such directions have, as second moment, the Fisher information, which is the curvature of the KL. Of values standard
    normal ones, for that of half the squared distance.

    Args:
        first_sequence: place of the batch's first text among those of all ranks.
        num_directions: of each text; None: rows are tokens, which are so many that one direction each will do.
    """
    draw = torch.randn if kind == "values" else torch.rand
    size = (1, batch.input_ids.shape[1]) if num_directions is None else (num_directions,)
    size += (logits.shape[1] if kind == "values" else NUMBERS,)
    numbers = torch.stack([draw(size, generator=one) for one in generators(batch, first_sequence, seed)], 1).to(logits)
    if num_directions is None:
        numbers = numbers.flatten(1, 2)[:, batch.target_index]
    return numbers if kind == "values" else torch.stack([label_direction(logits, row) for row in numbers])


def refit_labels(refit: Refit) -> None:
    """Fit the head of labels to the old one's, in place: its first linear, where it has two, to what the neurons that
    stay put out, then its norm, then the logits."""
    old, new = (refit.family.classifier(model) for model in (refit.old, refit.new))
    if not (refit.is_affected or refit.changes.touch(old.reader)):
        return
    before = [old.rows(stream.old.hidden, stream.batch) for stream in refit.streams]
    after = [new.rows(stream.new.hidden, stream.batch) for stream in refit.streams]
    put_out = [old.put_out(rows) for rows in before]
    if new.linear is not None:
        _refit_inner(refit, old, new, put_out, after)
    inner = [new.inner(new.put_out(rows)) for rows in after]
    fit_linear([new.decoder], map(Rows, inner, (old.decoder(old.inner(rows)) for rows in put_out)), refit.ridge)


def _refit_inner(refit: Refit, old: Classifier, new: Classifier, put_out: list[Tensor], after: list[Tensor]) -> None:
    """Fit the first linear and the norm behind it.

    Args:
        put_out: what the old linear puts out, each (R, C).
        after: what the new one reads.
    """
    wanted = [refit.changes.of_outputs(old.linear, rows) for rows in put_out]
    fit_linear([new.linear], map(Rows, after, wanted), refit.ridge)
    if new.norm is not None:
        of_norm = [refit.changes.of_outputs(old.linear, old.inner(rows)) for rows in put_out]
        fit_norm(new.norm, map(Rows, (new.activation(new.linear(rows)) for rows in after), of_norm), refit.ridge)


@torch.no_grad()
def logit_distance(
    models: tuple[nn.Module, nn.Module], family: ModelFamily, batches: Sequence[Batch], kind: LogitKind
) -> Tensor:
    """Sums over rows of this rank, fp64 (4,), of which `mean_distance` makes one number: how far the logits of two
    models are from each other, and those of the first from 0, both squared or the first one as KL (nats), then the
    first one's own sum, and the number of logits or rows."""
    sums = torch.zeros(4, dtype=torch.float64, device=batches[0].input_ids.device)
    for batch in batches:
        inputs = batch.input_ids, batch.padding_mask, batch.token_types
        before, after = (
            family.classifier(model).logits(run_backbone(model, family, *inputs), batch).double() for model in models
        )
        if kind == "categories":
            logs = after.log_softmax(-1), before.log_softmax(-1)
            distance, count = functional.kl_div(*logs, reduction="sum", log_target=True), len(before)
        else:
            distance, count = (after - before).square().sum(), before.numel()
        sums += torch.stack([distance, before.square().sum(), before.sum(), distance.new_tensor(count)])
    return sums


def mean_distance(sums: Tensor, kind: LogitKind) -> float:
    """KL (nats) of a row, or the share of the variance of scores that is lost, of `logit_distance` over all ranks."""
    distance, square, total, count = sums.tolist()
    if kind == "categories":
        return distance / count
    return distance / max(square - total**2 / count, torch.finfo(torch.float32).tiny)
