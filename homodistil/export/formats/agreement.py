"""How far an exported graph is from the torch model that it was made of, and what is refused."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn.functional import cosine_similarity, kl_div, log_softmax

from homodistil.errors import UserError
from homodistil.export.formats.exportable import Exportable
from homodistil.export.formats.layout import FORMATS, Limits
from homodistil.export.formats.runners import Runner, torch_runner


class Agreement(NamedTuple):
    """Of the outputs of all batches, at tokens that are no padding."""

    difference: float
    """Largest absolute difference, divided by the largest absolute output of torch."""
    cosine: float
    """Mean over tokens (sequences, where a head puts out one row for each) of the cosine with torch's output."""
    kl: float | None = None
    """Of logits: mean KL of the probabilities to torch's, nats. None: hidden states have none."""


def agreement(model: Exportable, exported: Runner) -> Agreement:
    """Compare `exported` with torch on padded random batches of several lengths.

    Returns:
        (infinity, NaN, NaN) where the shapes differ: the graph is of another model.
    """
    reference, differences, scales, cosines, kls = torch_runner(model), [], [], [], []
    for batch in model.comparison_batches():
        inputs = {name: tensor.numpy() for name, tensor in batch.items()}
        expected, actual = reference(inputs), exported(inputs)
        if expected.shape != actual.shape:
            return Agreement(math.inf, math.nan, math.nan)
        # Of padding nobody reads the output, and masked softmax rows differ there by right.
        rows = inputs["attention_mask"].astype(bool) if expected.ndim == 3 else slice(None)
        expected, actual = (torch.from_numpy(output[rows]).double() for output in (expected, actual))
        differences.append((expected - actual).abs().max())
        scales.append(expected.abs().max())
        cosines.append(cosine_similarity(expected, actual, dim=-1))
        if model.output_name == "logits":
            both = (log_softmax(output, -1) for output in (actual, expected))
            kls.append(kl_div(*both, reduction="none", log_target=True).sum(-1))
    difference = torch.stack(differences).max() / torch.stack(scales).max().clamp(min=torch.finfo(torch.double).tiny)
    return Agreement(float(difference), float(torch.cat(cosines).mean()), float(torch.cat(kls).mean()) if kls else None)


def require(actual: Agreement, name: str, limits: Limits) -> None:
    """Raise `UserError` where a format is too far from torch.

    Args:
        name: of the format; one with weights of 8 bits is held to `limits`, every other one to its `max_difference`.
    """
    allowed = FORMATS[name].max_difference
    if allowed is None:
        _require_8_bits(actual, name, limits)
    elif not actual.difference <= allowed:  # NaN is refused too
        raise UserError(
            f"--format {name}: the file differs from torch by {actual.difference:.2g} of the largest output, allowed "
            f"is {allowed:g}; nothing was kept: try other versions of torch and {FORMATS[name].extra}, and report it"
        )


def _require_8_bits(actual: Agreement, name: str, limits: Limits) -> None:
    how = f"nothing was kept: take {name.partition('-')[0]}, or measure your task with 8 bits and then"
    if not actual.cosine >= limits.min_cosine:
        raise UserError(
            f"--format {name}: mean cosine with torch {actual.cosine:.6f}, allowed is --min-cosine "
            f"{limits.min_cosine:g} or more; {how} lower --min-cosine"
        )
    if actual.kl is not None and not actual.kl <= limits.max_kl:
        raise UserError(
            f"--format {name}: mean KL to torch's probabilities {actual.kl:.3g} nats, allowed is --max-kl "
            f"{limits.max_kl:g} or less; {how} raise --max-kl"
        )
