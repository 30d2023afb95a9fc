"""One calibration micro-batch on its way through the network before an event and the one after it.

B sequences, T tokens, D hidden before, d after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from homodistil.data.batch import Batch
from homodistil.models.backbone import layer_inputs
from homodistil.models.family import ModelFamily


@dataclass
class Side:
    """Where one network is: the residual stream, and what its layers are called with."""

    hidden: Tensor
    """(B, T, D or d)."""
    options: Sequence[Mapping[str, Any]]

    def run_layer(self, layer: nn.Module, i: int) -> Tensor:
        """What layer `i` makes of the stream, (B, T, D or d)."""
        output = layer(self.hidden, **self.options[i])
        return output[0] if isinstance(output, tuple) else output


@dataclass
class Stream:
    batch: Batch
    old: Side
    new: Side

    def rows(self, activations: Tensor) -> Tensor:
        """(B, T, K) -> (valid tokens, K)."""
        rows = activations.flatten(0, 1)
        return rows if self.batch.padding_mask is None else rows[self.batch.token_index]

    def target_rows(self, activations: Tensor) -> Tensor:
        """(B, T, K) -> (rows to predict, K)."""
        return activations.flatten(0, 1)[self.batch.target_index]


def start(old: nn.Module, new: nn.Module, family: ModelFamily, batch: Batch) -> Stream:
    """`batch` behind the embeddings of both networks."""
    inputs = batch.input_ids, batch.padding_mask, batch.token_types
    sides = (layer_inputs(model, family, *inputs) for model in (old, new))
    return Stream(batch, *(Side(entering.hidden, entering.options) for entering in sides))
