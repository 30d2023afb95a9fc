"""nn.Linear and GPT-2's Conv1D, whose weight is transposed, as one thing: a matrix of (outputs, inputs)."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def output_dim(linear: nn.Module) -> int:
    """The dimension of the weight that runs over the outputs."""
    return 1 if isinstance(linear, Conv1D) else 0


def matrix_of(linear: nn.Module) -> Tensor:
    """The weight as (outputs, inputs): a view, so that what is written into it is written into the weight."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight
