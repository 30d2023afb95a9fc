"""How an event's plan changes activations: outputs of linears, and the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from homodistil.models.axes import AxisTable, AxisUse
from homodistil.models.linears import output_dim
from homodistil.models.resize_plan import ResizePlan, transform


class Changes:
    """Old activations -> what the new network should have in their place.

    Args:
        old: the network before the event.
        table: of `old`.
    """

    def __init__(self, old: nn.Module, table: AxisTable, plan: ResizePlan) -> None:
        self._names = {id(parameter): name for name, parameter in old.named_parameters()}
        self._plan = plan
        # Not a vector: what multiplies the stream, a norm's gain, has the squares of its map.
        self._stream = next((u.parameter, u.dim) for u in table.uses if u.axes == ("hidden",) and _is_matrix(old, u))

    def of_outputs(self, linear: nn.Module, rows: Tensor) -> Tensor:
        """Rows (..., K) that `linear` of the old network has put out."""
        return self._changed(self._names[id(linear.weight)], output_dim(linear), rows)

    def of_inputs(self, linear: nn.Module, rows: Tensor) -> Tensor:
        """Rows (..., K) that `linear` of the old network reads."""
        return self._changed(self._names[id(linear.weight)], 1 - output_dim(linear), rows)

    def of_stream(self, rows: Tensor) -> Tensor:
        """Rows (..., D) of the residual stream, or of what adds to it."""
        return self._changed(*self._stream, rows)

    @property
    def project_stream(self) -> bool:
        """Whether the residual stream is rotated or projected; otherwise its dims are selected, or it stays."""
        name, dim = self._stream
        return dim in self._plan.maps.get(name, {})

    @property
    def touch_stream(self) -> bool:
        """Whether the residual stream changes at all."""
        return self._stream[1] in self._plan.sizes.get(self._stream[0], {})

    def touch(self, module: nn.Module) -> bool:
        """Whether any parameter of this module of the old network changes."""
        return any(self._names[id(parameter)] in self._plan.sizes for parameter in module.parameters())

    def _changed(self, name: str, dim: int, rows: Tensor) -> Tensor:
        index, maps = self._plan.index.get(name, {}), self._plan.maps.get(name, {})
        last = rows.ndim - 1
        return transform(rows, {last: index[dim]} if dim in index else {}, {last: maps[dim]} if dim in maps else {})


def _is_matrix(model: nn.Module, use: AxisUse) -> bool:
    return model.get_parameter(use.parameter).ndim == 2
