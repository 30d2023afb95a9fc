"""The vocabulary head after a cut, where it has a transform: refitted like any layer, or put where its activation is a
straight line.

The activation works on single coordinates, so a rotated residual stream cannot go through it as before. What matters
is only what enters the decoder: the new head aims at the rows of the old one that give the best logits in the kept
span of the word embeddings, and takes them far to the right of zero, where the activation changes nothing; the
LayerNorm behind takes the common offset out again. Source: compensation study, section 4.

Rows are those to predict: the head is used on no others (fitted to all tokens, the KL is .06 to .10 nats worse).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from homodistil.distributed import ranks
from homodistil.models.backbone import input_of
from homodistil.models.compensable import HeadParts
from homodistil.models.linears import matrix_of
from homodistil.models.norms import Norm
from homodistil.pruning.compensation.least_squares import Rows, fit_linear, fit_norm, sum_over_rows
from homodistil.pruning.compensation.moments import TINY
from homodistil.pruning.compensation.refit import Refit
from homodistil.pruning.compensation.targets import captured

OFFSET = 3.0
"""Offset of standardised targets: gelu(3 - 2) = 0.84 is still nearly straight."""


def can_straighten(head: HeadParts) -> bool:
    """Whether its activation leaves large values alone (gelu, relu; not tanh), and its linear can shift them there."""
    large = torch.linspace(OFFSET, 3 * OFFSET, 7)
    return head.linear.bias is not None and torch.allclose(head.activation(large), large, rtol=0.05)


def refit_head(refit: Refit) -> None:
    """Fit linear and norm of the head to the old one's, in place, and the decoder's bias after them."""
    old, new = refit.family.head_parts(refit.old), refit.family.head_parts(refit.new)
    before, targets = _old_head(refit)
    wanted = [refit.changes.of_outputs(old.linear, rows) for rows in before]
    hidden = [stream.target_rows(stream.new.hidden) for stream in refit.streams]
    fit_linear([new.linear], map(Rows, hidden, wanted), refit.ridge)
    decoder = refit.family.decoder(refit.old)
    _finish(refit, hidden, [refit.changes.of_inputs(decoder, rows) for rows in targets], targets)


def straighten_head(refit: Refit, decoder_gram: Tensor) -> None:
    """Fit the head to the best rows for the kept span of the word embeddings, without its activation's bend.

    Args:
        decoder_gram: of the old decoder (statistics.py), (D, D).
    """
    new = refit.family.head_parts(refit.new)
    _, targets = _old_head(refit)
    best = _best_rows(refit, decoder_gram).to(targets[0].dtype)
    wanted = [rows @ best for rows in targets]
    hidden = [stream.target_rows(stream.new.hidden) for stream in refit.streams]
    matrix_of(new.linear).zero_()
    fit_linear([new.linear], map(Rows, hidden, _standardised_over_rows(wanted, new.norm)), refit.ridge)
    new.linear.bias.add_(OFFSET)
    _finish(refit, hidden, wanted, targets)


def _old_head(refit: Refit) -> tuple[list[Tensor], list[Tensor]]:
    """Rows before the activation of the old head, and rows that enter its decoder."""
    linear, transform = refit.family.head_parts(refit.old).linear, refit.family.lm_transform(refit.old)
    before, after = [], []
    for stream in refit.streams:
        with captured([linear], []) as (put_out, _):
            after.append(transform(stream.target_rows(stream.old.hidden)))
        before.append(put_out[linear])
    return before, after


def _best_rows(refit: Refit, decoder_gram: Tensor) -> Tensor:
    """(D, d): old decoder rows' coordinates -> the new ones that give the nearest logits.

    G P (P' G P)^-1 for the gram matrix G of the old decoder E, where the new one is E P.
    """
    decoder = refit.family.decoder(refit.old)
    crossed = refit.changes.of_inputs(decoder, decoder_gram)
    among_new = refit.changes.of_inputs(decoder, crossed.T)
    among_new.diagonal().add_(1e-6 * among_new.diagonal().mean().clamp(min=TINY))
    return torch.linalg.solve(among_new, crossed.T).T


def _standardised_over_rows(rows: list[Tensor], norm: Norm) -> list[Tensor]:
    """Each dim standardised over all rows of all ranks, then each row over its dims: the shape that `norm` gives."""
    doubles = [part.double() for part in rows]
    sums = sum_over_rows(torch.stack([p.sum(0), p.square().sum(0), p.new_full(p.shape[1:], len(p))]) for p in doubles)
    mean, square = sums[:2] / sums[2].clamp(min=TINY)
    deviation = (square - mean.square()).clamp(min=TINY).sqrt()
    return [norm.standardise((part - mean) / deviation) for part in doubles]


def _finish(refit: Refit, hidden: list[Tensor], wanted: list[Tensor], old_rows: list[Tensor]) -> None:
    """The norm, then the decoder's bias: mean logits as they were. Logits are linear, so no row of them is made."""
    norm, transform = refit.family.head_parts(refit.new).norm, refit.family.lm_transform(refit.new)
    sums = [input_of(norm.module, partial(transform, rows)) for rows in hidden]
    fit_norm(norm, map(Rows, sums, wanted), refit.ridge)
    old_decoder, new_decoder = refit.family.decoder(refit.old), refit.family.decoder(refit.new)
    if new_decoder.bias is None:
        return
    old_mean, new_mean = _mean(old_rows), _mean([norm.module(rows) for rows in sums])
    shift = old_decoder.weight.double() @ old_mean - new_decoder.weight.double() @ new_mean
    new_decoder.bias.add_(ranks.from_first(shift))


def _mean(rows: list[Tensor]) -> Tensor:
    sums = sum_over_rows(torch.cat([part.double().sum(0), part.new_tensor([len(part)])]) for part in rows)
    return sums[:-1] / sums[-1].clamp(min=TINY)
