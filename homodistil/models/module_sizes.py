"""The sizes that modules remember, set from the axis table after their parameters have been sliced; and which of them
is that of the input."""

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


_INPUT_SIZES = ("in_features", "nx")


def input_dim(module: nn.Module) -> int | None:
    """The dimension of `module.weight` that its inputs run over; None: it is no linear."""
    return next((dim for (_, dim), name in _fields_of(module).items() if name in _INPUT_SIZES), None)


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
    fields = _fields_of(module)
    if (parameter_name, dim) in fields:
        setattr(module, fields[parameter_name, dim], size)


def _fields_of(module: nn.Module) -> dict[tuple[str, int], str]:
    return next((fields for kind, fields in _FIELDS.items() if isinstance(module, kind)), {})
