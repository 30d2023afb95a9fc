"""What each block of the new network should compute: what the old one does, in the new one's widths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from homodistil.models.compensable import Block
from homodistil.models.norms import Norm
from homodistil.pruning.compensation.changes import Changes
from homodistil.pruning.compensation.stream import Stream


class BlockTargets(NamedTuple):
    """Rows of the valid tokens of one micro-batch, in the new widths; None: of a norm that the block does not have."""

    input_normed: Tensor | None
    """What leaves the input norm."""
    inputs: Tensor
    """What the input linears put out, side by side."""
    added: Tensor | None
    """What enters the output norm."""
    summed: Tensor
    """The residual stream behind the sum."""
    normed: Tensor | None
    """What leaves the stream norm."""


def run_old_layer(
    layer: nn.Module, i: int, blocks: tuple[Block, Block], stream: Stream, changes: Changes
) -> tuple[BlockTargets, BlockTargets]:
    """Run layer `i` of the old network, which moves its side of `stream` on."""
    outputs = [module for block in blocks for module in _seen_behind(block)]
    inputs = [_seen_before(blocks[0]), blocks[1].entry, _seen_before(blocks[1])]
    with captured(outputs, [module for module in inputs if module is not None]) as (put_out, taken_in):
        stream.old.hidden = stream.old.run_layer(layer, i)
    sums = (
        taken_in[_seen_before(blocks[0]) or blocks[1].entry],
        taken_in.get(_seen_before(blocks[1]), stream.old.hidden),
    )
    both = [_targets(block, summed, put_out, stream, changes) for block, summed in zip(blocks, sums, strict=True)]
    return both[0], both[1]


def behind_layers(of_layers: Sequence[tuple[BlockTargets, BlockTargets]]) -> tuple[BlockTargets, BlockTargets]:
    """Targets of one layer that stands for several consecutive ones: those of the first layer, except for the residual
    stream behind the second block, which is that of the last layer.

    Args:
        of_layers: for each layer, the targets of its two blocks.
    """
    first, second = of_layers[0]
    last = of_layers[-1][1]
    return first, second._replace(summed=last.summed, normed=last.normed)


def _seen_behind(block: Block) -> list[nn.Module]:
    norms = [norm.module for norm in (block.input_norm, block.stream_norm) if norm is not None]
    return [*norms, *block.inputs, *([block.output] if block.output_norm is not None else [])]


def _seen_before(block: Block) -> nn.Module | None:
    return None if block.stream_norm is None else block.stream_norm.module


def _targets(
    block: Block, summed: Tensor, put_out: dict[nn.Module, Tensor], stream: Stream, changes: Changes
) -> BlockTargets:
    def behind(norm: Norm | None) -> Tensor | None:
        return None if norm is None else changes.of_stream(stream.rows(put_out[norm.module]))

    added = None if block.output_norm is None else stream.rows(put_out[block.output])
    if added is not None and changes.project_stream:
        # The output norm's gain cannot stand behind a projection: the linear takes over all of it but its mean.
        gain = block.output_norm.gain
        added = added * (gain / gain.abs().mean()).to(added.dtype)
    return BlockTargets(
        input_normed=behind(block.input_norm),
        inputs=torch.cat([changes.of_outputs(m, stream.rows(put_out[m])) for m in block.inputs], 1),
        added=None if added is None else changes.of_stream(added),
        summed=changes.of_stream(stream.rows(summed)),
        normed=behind(block.stream_norm),
    )


@contextmanager
def captured(outputs: Sequence[nn.Module], inputs: Sequence[nn.Module]) -> Iterator[tuple[dict, dict]]:
    """What these modules put out, and the first argument of those, while the block runs: module -> tensor."""
    put_out: dict[nn.Module, Tensor] = {}
    taken_in: dict[nn.Module, Tensor] = {}
    handles = [m.register_forward_hook(lambda module, _args, output: put_out.update({module: output})) for m in outputs]
    handles += [m.register_forward_pre_hook(lambda module, args: taken_in.update({module: args[0]})) for m in inputs]
    try:
        yield put_out, taken_in
    finally:
        for handle in handles:
            handle.remove()
