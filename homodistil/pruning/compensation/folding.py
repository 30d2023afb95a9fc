"""Gains of norms, put into the linears behind them: what remains commutes with a rotation of the residual stream.

W (gain * z + shift) = (W diag(gain)) z + W shift for the standardised rows z, so nothing changes. A gain that a tied
decoder reads has nowhere to go, as its weight is the embeddings' too; the gain of a norm that ends a block is a part of
the residual stream itself. These stay. Source: Ashkboos et al. 2024 (SliceGPT, arXiv 2401.15024, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from homodistil.models.family import ModelFamily
from homodistil.models.linears import matrix_of
from homodistil.models.norms import Norm


@torch.no_grad()
def fold_gains(model: nn.Module, family: ModelFamily) -> None:
    """Fold the gains of all norms that only linears read, in place. The model computes the same afterwards."""
    for i in range(len(family.layers(model))):
        for block in family.blocks(model, i):
            if block.input_norm is not None:
                _fold(block.input_norm, block.inputs)
    final, readers = family.norm(family.final_norm(model)), _readers_of_final_norm(model, family)
    if final is not None and readers:
        _fold(final, readers)


def _readers_of_final_norm(model: nn.Module, family: ModelFamily) -> Sequence[nn.Module]:
    """The linear that reads what the backbone puts out; none where its weight has another reader. That of labels reads
    single rows or the mean of some, both of which a gain scales alike."""
    if family.has_classifier(model):
        return (family.classifier(model).reader,)
    if not family.has_head(model):
        return ()
    head, decoder = family.head_parts(model), family.decoder(model)
    if head is not None:
        return (head.linear,)
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p is decoder.weight]
    return (decoder,) if len(names) == 1 else ()


def _fold(norm: Norm, linears: Sequence[nn.Module]) -> None:
    gain, shift = norm.gain, norm.shift
    if shift is not None:
        shift = _without_shift(linears, gain, shift)
    for linear in linears:
        matrix = matrix_of(linear)
        matrix.copy_(matrix.double() * gain)
    norm.write(torch.ones_like(gain), shift)


def _without_shift(linears: Sequence[nn.Module], gain: Tensor, shift: Tensor) -> Tensor:
    """Put the shift into the biases of what reads it. Returns what has to stay of it, once the gain has gone."""
    if any(linear.bias is None for linear in linears):
        return shift / torch.where(gain == 0, 1.0, gain)
    for linear in linears:
        linear.bias.add_((matrix_of(linear).double() @ shift).to(linear.bias.dtype))
    return torch.zeros_like(shift)
