"""The sizes that modules remember, set from the axis table after their parameters have been sliced."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from homodistil.models.axes import AxisTable

_FIELDS = {
    nn.Linear: {("weight", 0): "out_features", ("weight", 1): "in_features"},
    nn.Embedding: {("weight", 1): "embedding_dim"},
    Conv1D: {("weight", 0): "nx", ("weight", 1): "nf"},
}
"""Module -> its parameter and dimension -> attribute. Norms without an entry remember no size."""


def refresh_sizes(model: nn.Module, table: AxisTable) -> None:
    """Set what every module that holds a parameter of `table` remembers of its sizes (`in_features`, `out_features`,
    `embedding_dim`, `normalized_shape`, `nf`, `nx`), tied ones under all their names."""
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    for (first_name, dim), size in table.dim_sizes().items():
        for name in names_of[id(model.get_parameter(first_name))]:
            path, _, parameter_name = name.rpartition(".")
            _refresh(model.get_submodule(path), parameter_name, dim, size)


def _refresh(module: nn.Module, parameter_name: str, dim: int, size: int) -> None:
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = (size,)
    fields = next((fields for kind, fields in _FIELDS.items() if isinstance(module, kind)), {})
    if (parameter_name, dim) in fields:
        setattr(module, fields[parameter_name, dim], size)
