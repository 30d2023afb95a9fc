"""Sequential least-squares refit: every part of the cut network learns to put out what the old one did.

Forward order, one layer at a time: q, k, v -> attention output -> its LayerNorm -> ffn in -> ffn out -> LayerNorm ->
next layer -> MLM head (head.py). The new network is fed with its OWN activations, so that each part also makes up for
what the parts before it could not. Old and new advance together; old activations of one layer are held at a time.
Source: compensation study, section 4. B sequences, T tokens, D hidden before, d after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from homodistil.data.batch import Batch
from homodistil.models.family import ModelFamily
from homodistil.models.resize_plan import ResizePlan, transform
from homodistil.pruning.compensation.least_squares import TINY, fit_linear, fit_norm, sum_over_rows


@dataclass
class Stream:
    """One micro-batch on its way through both networks."""

    batch: Batch
    old: Tensor
    """(B, T, D)."""
    new: Tensor
    """(B, T, d)."""

    @property
    def seen(self) -> Tensor | None:
        mask = self.batch.padding_mask
        return None if mask is None else mask[:, None, None, :].bool()

    def rows(self, activations: Tensor) -> Tensor:
        """(B, T, K) -> (valid tokens, K)."""
        rows = activations.flatten(0, 1)
        return rows if self.batch.padding_mask is None else rows[self.batch.token_index]

    def target_rows(self, activations: Tensor) -> Tensor:
        """(B, T, K) -> (rows to predict, K)."""
        return activations.flatten(0, 1)[self.batch.target_index]


class Changes:
    """How the plan changes activations: those of a linear's outputs as its bias, and the residual stream's."""

    def __init__(self, old: nn.Module, plan: ResizePlan) -> None:
        self._names = {id(parameter): name for name, parameter in old.named_parameters()}
        self._plan = plan

    def of(self, parameter: nn.Parameter, activations: Tensor) -> Tensor:
        """Activations (..., K) that run along dim 0 of `parameter` of the old network, as the new one should have them.

        For the residual stream: the bias of a LayerNorm or of a linear that adds to it.
        """
        name, last = self._names[id(parameter)], activations.ndim - 1
        index, maps = self._plan.index.get(name, {}), self._plan.maps.get(name, {})
        selected = {last: index[0]} if 0 in index else {}
        return transform(activations, selected, {last: maps[0]} if 0 in maps else {})

    def touch(self, module: nn.Module) -> bool:
        """Whether any parameter of this module of the old network changes."""
        return any(self._names[id(parameter)] in self._plan.sizes for parameter in module.parameters())


class LayerTargets(NamedTuple):
    """What the new layer should put out, in its own widths: rows of valid tokens of one micro-batch."""

    query: Tensor
    key: Tensor
    value: Tensor
    attention_sum: Tensor
    """What enters the LayerNorm after attention."""
    attention: Tensor
    """What leaves it."""
    neurons: Tensor
    """Before the activation."""
    ffn_sum: Tensor
    output: Tensor
    """Output of the layer."""


class Refit:
    """Both networks, and where each micro-batch is on its way. `old` and `new` are in evaluation mode.

    Args:
        new: `old` as `plan` has cut it; its weights are changed here.
        batches: this rank's calibration micro-batches.
        ridge: see least_squares.
    """

    def __init__(
        self,
        old: nn.Module,
        new: nn.Module,
        family: ModelFamily,
        plan: ResizePlan,
        batches: Sequence[Batch],
        ridge: float,
    ) -> None:
        self.old, self.new, self.family, self.ridge = old, new, family, ridge
        self.changes = Changes(old, plan)
        self.is_affected = False
        """Whether anything before the part in hand has changed."""
        with torch.no_grad():
            self.streams = [Stream(batch, self._embed(old, batch), self._embed(new, batch)) for batch in batches]

    def _embed(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.family.embeddings(model)(input_ids=batch.input_ids)

    def run(self) -> None:
        """All up to the last layer. Parts before the first that the event changes are left alone."""
        self._embeddings()
        for i in range(len(self.family.layers(self.old))):
            self._layer(i)

    def lost(self) -> float:
        """Share of the variance of the old hidden states (as the plan has them) that the new ones do not explain."""
        changed = [(s.rows(s.new), self.changed_hidden(s.rows(s.old))) for s in self.streams]
        sums = sum_over_rows(_error_sums(new, target) for new, target in changed)
        error, square, mean = sums[0].sum(), sums[1].sum(), sums[2] / sums[3]
        return float(error / (square - (mean.square() * sums[3]).sum()).clamp(min=TINY))

    def changed_hidden(self, rows: Tensor) -> Tensor:
        """Rows of the old residual stream, or what adds to it, in the new network's dims."""
        return self.changes.of(self.family.embedding_norm(self.old).bias, rows)

    def _fit(self, linears: Sequence[nn.Linear], pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        fit_linear(linears, pairs, self.ridge)

    def _affects(self, module: nn.Module) -> bool:
        self.is_affected = self.is_affected or self.changes.touch(module)
        return self.is_affected

    def _embeddings(self) -> None:
        if not self._affects(self.family.embeddings(self.old)):
            return
        norm = self.family.embedding_norm(self.new)
        sums = [inputs_of(norm, self._embed, self.new, stream.batch) for stream in self.streams]
        pairs = ((s.rows(z), self.changed_hidden(s.rows(s.old))) for s, z in zip(self.streams, sums, strict=True))
        fit_norm(norm, pairs, self.ridge)
        for stream, summed in zip(self.streams, sums, strict=True):
            stream.new = norm(summed)

    def _layer(self, i: int) -> None:
        parts = self.family.layer_parts(self.new)[i]
        targets = [self._old_layer(i, stream) for stream in self.streams]
        if self._affects(self.family.layers(self.old)[i]):
            self._attention(i, parts, targets)
            self._ffn(parts, targets)
        else:
            for stream in self.streams:
                stream.new = stream.old.clone()

    def _old_layer(self, i: int, stream: Stream) -> LayerTargets:
        """Run layer `i` of the old network, which moves its side of the stream on."""
        parts = self.family.layer_parts(self.old)[i]
        outputs = [parts.query, parts.key, parts.value, parts.attention_norm, parts.ffn_linear, parts.ffn_norm]
        inputs = [parts.attention_norm, parts.ffn_norm]
        with captured(outputs, inputs) as (put_out, taken_in):
            self.family.layers(self.old)[i](stream.old, attention_mask=stream.seen)
        stream.old = put_out[parts.ffn_norm]
        seen = {
            "query": (parts.query.bias, put_out[parts.query]),
            "key": (parts.key.bias, put_out[parts.key]),
            "value": (parts.value.bias, put_out[parts.value]),
            "attention_sum": (parts.attention_norm.bias, taken_in[parts.attention_norm]),
            "attention": (parts.attention_norm.bias, put_out[parts.attention_norm]),
            "neurons": (parts.ffn_linear.bias, put_out[parts.ffn_linear]),
            "ffn_sum": (parts.ffn_norm.bias, taken_in[parts.ffn_norm]),
            "output": (parts.ffn_norm.bias, put_out[parts.ffn_norm]),
        }
        return LayerTargets(
            **{n: self.changes.of(bias, stream.rows(activations)) for n, (bias, activations) in seen.items()}
        )

    def _attention(self, i: int, parts, targets: list[LayerTargets]) -> None:
        """After this, `stream.new` is the residual stream between attention and feed-forward block."""
        both = list(zip(self.streams, targets, strict=True))
        qkv = [parts.query, parts.key, parts.value]
        self._fit(qkv, ((s.rows(s.new), torch.cat([t.query, t.key, t.value], 1)) for s, t in both))
        contexts = [self.family.attend(self.new, i, stream.new, stream.seen) for stream in self.streams]
        pairs = ((s.rows(c), t.attention_sum - s.rows(s.new)) for (s, t), c in zip(both, contexts, strict=True))
        self._fit([parts.attention_linear], pairs)
        self._norm(parts.attention_output, parts.attention_norm, contexts, [t.attention for t in targets])

    def _ffn(self, parts, targets: list[LayerTargets]) -> None:
        both = list(zip(self.streams, targets, strict=True))
        self._fit([parts.ffn_linear], ((s.rows(s.new), t.neurons) for s, t in both))
        active = [parts.ffn(stream.new) for stream in self.streams]
        pairs = ((s.rows(h), t.ffn_sum - s.rows(s.new)) for (s, t), h in zip(both, active, strict=True))
        self._fit([parts.ffn_output_linear], pairs)
        self._norm(parts.ffn_output, parts.ffn_norm, active, [t.output for t in targets])

    def _norm(self, block: Callable, norm: nn.LayerNorm, inputs: list[Tensor], targets: list[Tensor]) -> None:
        """Fit the LayerNorm that ends an output block, and move the new side of the streams behind it."""
        sums = [inputs_of(norm, block, h, s.new) for s, h in zip(self.streams, inputs, strict=True)]
        fit_norm(norm, ((s.rows(z), t) for s, z, t in zip(self.streams, sums, targets, strict=True)), self.ridge)
        for stream, summed in zip(self.streams, sums, strict=True):
            stream.new = norm(summed)


def _error_sums(new: Tensor, target: Tensor) -> Tensor:
    """(4, d): sums over rows of the squared error, of the squared target, of the target, and of 1."""
    new, target = new.double(), target.double()
    ones = torch.full_like(target[:1].sum(0), len(target))
    return torch.stack([(new - target).square().sum(0), target.square().sum(0), target.sum(0), ones])


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


def inputs_of(module: nn.Module, run: Callable, *args) -> Tensor:
    """What `module` is given while `run(*args)` runs."""
    with captured([], [module]) as (_, taken_in):
        run(*args)
    return taken_in[module]
