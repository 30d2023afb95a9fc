"""A plan's maps: a rotated or projected axis -> the matrix of every parameter dimension that runs over it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from homodistil.distributed import ranks
from homodistil.models.axes import AxisTable, Keep, kind_of, layer_of, outer_axes, outer_axis
from homodistil.models.family import ModelFamily
from homodistil.pruning.compensation.rotation import head_map, query_key_maps, value_output_maps
from homodistil.pruning.compensation.statistics import HeadMoments


class AxisMaps:
    """`by_parameter` grows axis by axis; it is what `make_plan` takes.

    Args:
        keep: of the event; of mapped axes only the widths count.
    """

    def __init__(self, model: nn.Module, family: ModelFamily, table: AxisTable, keep: Keep) -> None:
        self._model, self._family, self._table, self._keep = model, family, table, keep
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.by_parameter: dict[str, dict[int, Tensor]] = {}

    def project(self, projection: Tensor) -> None:
        """Contract the residual stream with P (D, d). Of a gain, the diagonal of P' diag(gain) P stays."""
        gains = {name for name in norm_parameters(self._model) if name.endswith("weight")}
        for use in self._table.uses:
            if use.axes == ("hidden",):
                matrix = projection.square() if use.parameter in gains else projection
                self._set(use.parameter, use.dim, matrix)

    def rotate(self, axis: str, heads: HeadMoments) -> None:
        """Rotate the dims of every head of `axis` (`layer.3.qk_dim`), keep the leading ones of the heads that stay."""
        parts = self._family.head_linears(self._model, layer_of(axis))
        if kind_of(axis) == "qk_dim":
            matrices, places = query_key_maps(heads), (_outputs_of(parts.query), _outputs_of(parts.key))
        else:
            matrices = value_output_maps(heads, parts.output.weight)
            places = _outputs_of(parts.value), [(parts.output.weight, 1)]
        kept_heads, width = self._keep.get(outer_axis(axis, self._table.widths)), self._keep[axis].shape[-1]
        for matrix, of_matrix in zip(matrices, places, strict=True):
            whole = ranks.from_first(head_map(matrix, kept_heads, width))
            for parameter, dim in of_matrix:
                self._set(self._names[id(parameter)], dim, whole)

    def _set(self, parameter: str, dim: int, matrix: Tensor) -> None:
        self.by_parameter.setdefault(parameter, {})[dim] = matrix.cpu()


def norm_parameters(model: nn.Module) -> set[str]:
    """Names of the gains and shifts of all norms."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    norms = [module for module in model.modules() if getattr(getattr(module, "weight", None), "ndim", 0) == 1]
    return {names[id(parameter)] for norm in norms for parameter in norm.parameters(recurse=False)}


def _outputs_of(linear: nn.Module) -> list[tuple[nn.Parameter, int]]:
    parameters = [linear.weight, linear.bias]
    return [(parameter, 0) for parameter in parameters if parameter is not None]


def is_mapped(axis: str, model: nn.Module, family: ModelFamily) -> bool:
    """Whether an axis is rotated or projected; entries of the others are selected."""
    if axis == "hidden":
        return True
    is_of_heads = kind_of(axis) in ("qk_dim", "vo_dim")
    return is_of_heads and family.head_linears(model, layer_of(axis)) is not None


def leading(table: AxisTable, keep: Keep, axis: str) -> Tensor:
    """The keep of a mapped axis: its leading entries."""
    width = keep[axis].shape[-1]
    if axis == "hidden":
        return torch.arange(width)
    return torch.arange(width).repeat(table.widths[outer_axes(table.widths)[axis]], 1)
