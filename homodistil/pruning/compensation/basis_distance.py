"""How far a cut network is from the one before the event, as a differentiable function of the projection.

The weights of the cut network are those of the event's plan: whatever runs over the residual stream is contracted with
P. Only gains and shifts of its norms stay what they have been fitted to: squares of P do not follow what a norm needs
where it stands at the end of a block. (Measured on BERT-tiny cut to half: trained along with P, KL after the event is
.97 nats with mode=project instead of .92, and 1.00 where they begin with squares of P.)

D hidden before, d after.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from homodistil.data.batch import Batch
from homodistil.models.axes import AxisTable
from homodistil.models.backbone import run_backbone
from homodistil.models.family import ModelFamily
from homodistil.models.resize_plan import ResizePlan, transform
from homodistil.pruning.compensation.axis_maps import norm_parameters
from homodistil.pruning.compensation.moments import TINY

_LOGITS_AT_ONCE = 1 << 24
"""Elements of a micro-batch: 64 MiB in fp32, of which training holds a handful."""


class BasisDistance:
    """With a vocabulary head: KL(old || new), nats, at the rows to predict. Without: squared error of the last hidden
    states, brought back to D dims by P', as a share of each row's square.

    A head with a transform (BERT's) is fitted only after the cut, to give the old one's rows as well as the kept span
    of the word embeddings can (head.py). Until then the old transform stands in for it: it reads the new hidden states
    brought back by P', and what it puts out is replaced by the best rows of that span.

    Args:
        old: the network before the event; frozen, in evaluation mode.
        new: `old` as `plan` has cut it, its norms fitted; not changed.
        table: of `old`.
        batches: this rank's micro-batches.
        decoder_gram: of the old decoder (statistics.py), (D, D); None: there is no head.
    """

    def __init__(
        self,
        old: nn.Module,
        new: nn.Module,
        family: ModelFamily,
        table: AxisTable,
        plan: ResizePlan,
        batches: Sequence[Batch],
        decoder_gram: Tensor | None,
    ) -> None:
        self._old, self._new, self._family, self._batches = old, _Rows(new, family), family, batches
        self._gram = decoder_gram
        self._has_head = family.has_head(old)
        self._stream_dims = _stream_dims(table, norm_parameters(old))
        self._wide = {name: self._before_projection(old, plan, name) for name in self._stream_dims}
        self._unchanged = {n: p.detach() for n, p in new.named_parameters() if n not in self._stream_dims}
        with torch.no_grad():
            self._targets = [self._rows_of(_Rows(old, family), batch) for batch in batches]

    def _before_projection(self, old: nn.Module, plan: ResizePlan, name: str) -> Tensor:
        """A parameter after all that the plan does but the projection."""
        maps = {dim: m for dim, m in plan.maps[name].items() if dim not in self._stream_dims[name]}
        return transform(old.get_parameter(name).detach(), plan.index.get(name, {}), maps)

    def weights(self, projection: Tensor) -> dict[str, Tensor]:
        """Every parameter of the new network, by name, for P (D, d)."""
        contracted = {
            name: transform(wide, {}, dict.fromkeys(self._stream_dims[name], projection))
            for name, wide in self._wide.items()
        }
        return self._unchanged | contracted

    def of(self, number: int, projection: Tensor) -> tuple[Tensor, int]:
        """(sum over rows of micro-batch `number` of this rank, number of rows); beyond the last one from the first on.

        Args:
            projection: P, (D, d).
        """
        number %= len(self._batches)
        target = self._targets[number]
        weights = {f"model.{name}": weight for name, weight in self.weights(projection).items()}
        rows = self._rows_of(lambda *args: functional_call(self._new, weights, args), self._batches[number])
        if not self._has_head:
            return _relative_errors(target, rows @ projection.T.to(rows.dtype)).sum(), len(rows)
        with torch.no_grad():
            expected = self._family.lm_head(self._old)(target).log_softmax(-1)
        predicted = self._logits(rows, projection, weights).log_softmax(-1)
        return functional.kl_div(predicted, expected, reduction="sum", log_target=True), len(rows)

    def _rows_of(self, run: Callable[[Batch, Tensor | None], Tensor], batch: Batch) -> Tensor:
        """Last hidden states of one network at the rows that count, (rows, D or d)."""
        if not self._has_head:
            index = None if batch.padding_mask is None else batch.token_index
        else:
            index = self._some(batch.target_index)
        return run(batch, index)

    def _some(self, index: Tensor) -> Tensor:
        """As many of the rows to predict as there is memory for logits, evenly spread."""
        most = max(1, _LOGITS_AT_ONCE // len(self._family.decoder(self._old).weight))
        return index[:: -(-len(index) // most)] if len(index) else index

    def _logits(self, rows: Tensor, projection: Tensor, weights: dict[str, Tensor]) -> Tensor:
        if self._family.head_parts(self._old) is None:
            return functional_call(self._new, weights, (rows,))
        projection = projection.to(rows.dtype)
        entering = self._family.lm_transform(self._old)(rows @ projection.T)
        return self._family.decoder(self._old)(entering @ self._best_of_span(projection))

    def _best_of_span(self, projection: Tensor) -> Tensor:
        """(D, D): rows that enter the old decoder -> those in the span of P that give the nearest logits, which is
        G P (P' G P)^-1 P' for the decoder's gram matrix G."""
        crossed = self._gram.to(projection.dtype) @ projection
        among = projection.T @ crossed
        ridge = 1e-6 * among.diagonal().mean().detach().clamp(min=TINY)
        identity = torch.eye(len(among), dtype=among.dtype, device=among.device)
        return torch.linalg.solve(among + ridge * identity, crossed.T).T @ projection.T


def _stream_dims(table: AxisTable, left_out: Collection[str]) -> dict[str, list[int]]:
    """Parameter -> its dimensions that run over the residual stream."""
    dims: dict[str, list[int]] = {}
    for use in table.uses:
        if use.axes == ("hidden",) and use.parameter not in left_out:
            dims.setdefault(use.parameter, []).append(use.dim)
    return dims


def _relative_errors(target: Tensor, restored: Tensor) -> Tensor:
    """Squared error of each row as a share of the target's square, (rows,)."""
    return (target - restored).square().sum(1) / target.square().sum(1).clamp(min=TINY)


class _Rows(nn.Module):
    """A network as a function that `functional_call` can be given: of a batch, or of hidden rows."""

    def __init__(self, model: nn.Module, family: ModelFamily) -> None:
        super().__init__()
        self.model, self._family = model, family

    def forward(self, batch: Batch | Tensor, index: Tensor | None = None) -> Tensor:
        """Of a batch: last hidden states, (B, T, K) -> (rows at `index`, K); None: all. Of hidden rows: logits."""
        if isinstance(batch, Tensor):
            return self._family.lm_head(self.model)(batch)
        inputs = batch.input_ids, batch.padding_mask, batch.token_types
        rows = run_backbone(self.model, self._family, *inputs).flatten(0, 1)
        return rows if index is None else rows[index]
