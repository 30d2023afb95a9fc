"""Sequential least-squares refit: every part of the cut network learns to put out what the old one did.

Forward order, one residual block at a time: input norm -> linears that read the stream -> linear that adds to it ->
its norm -> the stream's norm -> next block -> vocabulary head (head.py). The new network is fed with its OWN
activations, so that each part also makes up for what the parts before it could not. Old and new advance together; old
activations of one layer are held at a time. Source: compensation study, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from homodistil.data.batch import Batch
from homodistil.models.backbone import input_of, run_backbone
from homodistil.models.compensable import Block
from homodistil.models.family import ModelFamily
from homodistil.models.norms import Norm
from homodistil.models.resize_plan import ResizePlan
from homodistil.pruning.compensation.changes import Changes
from homodistil.pruning.compensation.least_squares import Rows, fit_linear, fit_norm, sum_over_rows
from homodistil.pruning.compensation.moments import TINY
from homodistil.pruning.compensation.stream import Stream, start
from homodistil.pruning.compensation.targets import BlockTargets, behind_layers, run_old_layer


class Refit:
    """Both networks, and where each micro-batch is on its way. `old` and `new` are in evaluation mode.

    Args:
        new: `old` as `plan` has cut it, with the layers `kept`; its weights are changed here.
        batches: this rank's calibration micro-batches.
        ridge: see least_squares.
        fits_linears: False: norms alone are fitted; linears stay as `plan` has cut them.
        kept: layers of `old` that `new` has, ascending, with 0; None: all. Where layers have left directly
            after a kept one, its last block is fitted to what the last of them put out.
    """

    def __init__(
        self,
        old: nn.Module,
        new: nn.Module,
        family: ModelFamily,
        plan: ResizePlan,
        batches: Sequence[Batch],
        ridge: float | None,
        fits_linears: bool = True,
        kept: Sequence[int] | None = None,
    ) -> None:
        self._fits_linears, self._kept = fits_linears, kept
        self.old, self.new, self.family, self.ridge = old, new, family, ridge
        self.changes = Changes(old, family.axis_table(old), plan)
        self.is_affected = False
        """Whether anything before the part in hand has changed."""
        with torch.no_grad():
            self.streams = [start(old, new, family, batch) for batch in batches]

    def run(self) -> None:
        """All that the backbone has. Parts before the first that the event changes are left alone."""
        self._embeddings()
        num_layers = len(self.family.layers(self.old))
        kept = range(num_layers) if self._kept is None else self._kept
        for number, (first, following) in enumerate(pairwise([*kept, num_layers])):
            self._layer(number, range(first, following))
        self._final_norm()

    def lost(self) -> float:
        """Share of the variance of the old hidden states (as the plan has them) that the new ones do not explain."""
        changed = [(s.rows(s.new.hidden), self.changes.of_stream(s.rows(s.old.hidden))) for s in self.streams]
        sums = sum_over_rows(_error_sums(new, target) for new, target in changed)
        error, square, mean = sums[0].sum(), sums[1].sum(), sums[2] / sums[3]
        return float(error / (square - (mean.square() * sums[3]).sum()).clamp(min=TINY))

    def _embeddings(self) -> None:
        self.is_affected = self.changes.touch_stream
        norm = self.family.embedding_norm(self.new)
        if not self.is_affected or norm is None:
            return
        summed = [input_of(norm.module, partial(self._run_new, stream)) for stream in self.streams]
        self._norm(norm, summed, [self.changes.of_stream(s.rows(s.old.hidden)) for s in self.streams])

    def _run_new(self, stream: Stream) -> Tensor:
        batch = stream.batch
        return run_backbone(self.new, self.family, batch.input_ids, batch.padding_mask, batch.token_types)

    def _layer(self, number: int, span: range) -> None:
        """Fit layer `number` of the new network.

        Args:
            span: layers of the old network that it stands for: the same layer, and all that have left directly after
                it.
        """
        targets = [self._targets(stream, span) for stream in self.streams]
        self.is_affected = (
            self.is_affected or len(span) > 1 or self.changes.touch(self.family.layers(self.old)[span[0]])
        )
        if self.is_affected:
            for place, block in enumerate(self.family.blocks(self.new, number)):
                self._block(number, block, [of_layer[place] for of_layer in targets])
        else:
            for stream in self.streams:
                stream.new.hidden = stream.old.hidden.clone()

    def _targets(self, stream: Stream, span: range) -> tuple[BlockTargets, BlockTargets]:
        """What the two blocks of a new layer are fitted to, which stands for the layers `span` of the old network."""
        layers = self.family.layers(self.old)
        of_layers = [run_old_layer(layers[i], i, self.family.blocks(self.old, i), stream, self.changes) for i in span]
        return behind_layers(of_layers)

    def _block(self, i: int, block: Block, targets: list[BlockTargets]) -> None:
        """After this, the new side of the streams is behind the block."""
        entering = [stream.new.hidden for stream in self.streams]
        if block.input_norm is not None:
            entering = self._fitted_norm(block.input_norm, entering, [t.input_normed for t in targets])
        self._fit(block.inputs, entering, [t.inputs for t in targets])
        inner = [self._inner(i, block, s, h) for s, h in zip(self.streams, entering, strict=True)]
        added = self._output(block, inner, targets)
        summed = [part + s.new.hidden for part, s in zip(added, self.streams, strict=True)]
        if block.stream_norm is not None:
            return self._norm(block.stream_norm, summed, [t.normed for t in targets])
        self._move_on(summed)

    def _inner(self, i: int, block: Block, stream: Stream, entering: Tensor) -> Tensor:
        """What the output linear of a new block reads."""
        layer = self.family.layers(self.new)[i]
        run = partial(stream.new.run_layer, layer, i) if block.inner is None else partial(block.inner, entering)
        return input_of(block.output, run)

    def _output(self, block: Block, inner: list[Tensor], targets: list[BlockTargets]) -> list[Tensor]:
        """Fit what adds to the stream: to what is missing there. Returns what it adds."""
        missing = [t.summed - s.rows(s.new.hidden) for s, t in zip(self.streams, targets, strict=True)]
        # A stream that no norm ends has tokens of any size (attention sinks are 100 times the others), and the next
        # norm looks at each in proportion.
        weights = [None if block.stream_norm is not None else _inverse_size(t.summed) for t in targets]
        if block.output_norm is None:
            self._fit([block.output], inner, missing, weights)
            return [block.output(h) for h in inner]
        self._fit([block.output], inner, [t.added for t in targets], [_inverse_size(t.added) for t in targets])
        return self._fitted_norm(block.output_norm, [block.output(h) for h in inner], missing, weights)

    def _final_norm(self) -> None:
        """Take both sides of the streams behind the norm that ends the backbone, where one does."""
        old, new = (self.family.norm(self.family.final_norm(model)) for model in (self.old, self.new))
        if old is None:
            return
        for stream in self.streams:
            stream.old.hidden = old.module(stream.old.hidden)
        if self.is_affected:
            targets = [self.changes.of_stream(s.rows(s.old.hidden)) for s in self.streams]
            return self._norm(new, [s.new.hidden for s in self.streams], targets)
        self._move_on([new.module(s.new.hidden) for s in self.streams])

    def _fit(
        self,
        linears: Sequence[nn.Module],
        inputs: list[Tensor],
        targets: list[Tensor],
        weights: Sequence[Tensor | None] | None = None,
    ) -> None:
        if not self._fits_linears:
            return
        weights = weights or [None] * len(targets)
        parts = zip(self.streams, inputs, targets, weights, strict=True)
        fit_linear(linears, (Rows(s.rows(x), y, w) for s, x, y, w in parts), self.ridge)

    def _fitted_norm(
        self,
        norm: Norm,
        inputs: list[Tensor],
        targets: list[Tensor],
        weights: Sequence[Tensor | None] | None = None,
    ) -> list[Tensor]:
        """What `norm` makes of its inputs, once it has been fitted."""
        weights = weights or [None] * len(targets)
        parts = zip(self.streams, inputs, targets, weights, strict=True)
        fit_norm(norm, (Rows(s.rows(x), y, w) for s, x, y, w in parts), self.ridge)
        return [norm.module(x) for x in inputs]

    def _norm(self, norm: Norm, inputs: list[Tensor], targets: list[Tensor]) -> None:
        """Fit a norm that ends a block, and move the new side of the streams behind it."""
        self._move_on(self._fitted_norm(norm, inputs, targets))

    def _move_on(self, hidden: list[Tensor]) -> None:
        for stream, behind in zip(self.streams, hidden, strict=True):
            stream.new.hidden = behind


def _inverse_size(rows: Tensor) -> Tensor:
    """1 / root mean square of every row, fp64 (rows, 1)."""
    return rows.double().square().mean(-1, keepdim=True).clamp(min=TINY).rsqrt()


def _error_sums(new: Tensor, target: Tensor) -> Tensor:
    """(4, d): sums over rows of the squared error, of the squared target, of the target, and of 1."""
    new, target = new.double(), target.double()
    ones = torch.full_like(target[:1].sum(0), len(target))
    return torch.stack([(new - target).square().sum(0), target.square().sum(0), target.sum(0), ones])
