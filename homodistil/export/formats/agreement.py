"""How far an exported graph is from the torch model that it was made of, and what is refused."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from homodistil.errors import UserError
from homodistil.export.formats.exportable import Exportable
from homodistil.export.formats.runners import Runner, torch_runner

MAX_DIFFERENCE = 1e-4
"""Of an fp32 graph: largest difference of an output, relative to the largest output. Rounding is about 1e-6."""


class Agreement(NamedTuple):
    """Of the outputs of all batches, at tokens that are no padding."""

    difference: float
    """Largest absolute difference, divided by the largest absolute output of torch."""
    cosine: float
    """Mean over tokens (sequences, where a head puts out one row for each) of the cosine with torch's output."""


def agreement(model: Exportable, exported: Runner) -> Agreement:
    """Compare `exported` with torch on padded random batches of several lengths.

    Returns:
        (infinity, NaN) where the shapes differ: the graph is of another model.
    """
    reference, pairs = torch_runner(model), []
    for batch in model.comparison_batches():
        inputs = {name: tensor.numpy() for name, tensor in batch.items()}
        expected, actual = reference(inputs), exported(inputs)
        if expected.shape != actual.shape:
            return Agreement(math.inf, math.nan)
        # Of padding nobody reads the output, and masked softmax rows differ there by right.
        rows = inputs["attention_mask"].astype(bool) if expected.ndim == 3 else slice(None)
        pairs.append((expected[rows], actual[rows]))
    expected, actual = (np.concatenate(each).astype(np.float64) for each in zip(*pairs, strict=True))
    norms = np.linalg.norm(expected, axis=-1) * np.linalg.norm(actual, axis=-1)
    cosines = (expected * actual).sum(-1) / np.maximum(norms, np.finfo(np.float64).tiny)
    scale = max(np.abs(expected).max(), np.finfo(np.float64).tiny)
    return Agreement(float(np.abs(expected - actual).max() / scale), float(cosines.mean()))


def require(actual: Agreement, name: str, min_cosine: float) -> None:
    """Raise `UserError` where a graph is too far from torch.

    Args:
        name: of the format; int8 is held to `min_cosine`, every other one to `MAX_DIFFERENCE`.
    """
    if name == "onnx-int8":
        if not actual.cosine >= min_cosine:  # NaN is refused too
            raise UserError(
                f"--format onnx-int8: mean cosine with torch {actual.cosine:.6f}, allowed is --min-cosine "
                f"{min_cosine:g} or more; nothing was kept: export onnx, or lower --min-cosine after measuring the task"
            )
    elif not actual.difference <= MAX_DIFFERENCE:
        raise UserError(
            f"--format {name}: the graph differs from torch by {actual.difference:.2g} of the largest output, allowed "
            f"is {MAX_DIFFERENCE:g}; nothing was kept: try other versions of torch and onnxruntime, and report it"
        )
