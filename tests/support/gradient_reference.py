"""Naive second moments of gradients along the residual stream of a small BERT: autograd with the states as leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from homodistil.data.batch import Batch
from homodistil.models.encoders.bert import BERT as bert

NUM_LAYERS = 3


def gradient_moment(
    model: nn.Module,
    batches: Sequence[Batch],
    outputs_of: Callable[[Batch], Tensor],
    directions_of: Callable[[int, Batch, Tensor], Iterable[Tensor]],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """E[g g'] over the places of the stream, token by token, fp64 (24, 24); outputs and last states of each batch.

    Args:
        outputs_of: batch -> what gradients are taken of.
        directions_of: number of the batch, batch, outputs without a graph -> directions of the outputs.
    """
    total, count, outputs, last_states = torch.zeros(24, 24, dtype=torch.float64), 0, [], []
    for i, batch in enumerate(batches):
        states: list[Tensor] = []
        norms = [bert.embedding_norm(model), *(b.stream_norm for n in range(NUM_LAYERS) for b in bert.blocks(model, n))]
        handles = [norm.module.register_forward_hook(partial(_keep_as_leaf, states)) for norm in norms]
        with torch.enable_grad():
            output = outputs_of(batch)
        outputs.append(output.detach())
        last_states.append(states[-1].detach())
        for direction in directions_of(i, batch, output.detach()):
            for gradient in torch.autograd.grad((output * direction).sum(), states, retain_graph=True):
                rows = gradient[batch.attention_mask.bool()].double()
                total, count = total + rows.T @ rows, count + len(rows)
        for handle in handles:
            handle.remove()
    return total / count, outputs, last_states


def _keep_as_leaf(states: list[Tensor], _module: nn.Module, _args: tuple, output: Tensor) -> None:
    states.append(output if output.requires_grad else output.requires_grad_())
