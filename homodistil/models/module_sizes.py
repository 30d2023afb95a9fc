"""The sizes that modules remember, set from the axis table after their parameters have been sliced."""

from __future__ import annotations

from torch import nn

from homodistil.models.axes import AxisTable

_FIELDS = {
    nn.Linear: {("weight", 0): "out_features", ("weight", 1): "in_features"},
    nn.Embedding: {("weight", 1): "embedding_dim"},
}
"""Module -> its parameter and dimension -> attribute. Norms without an entry remember no size."""


def refresh_sizes(model: nn.Module, table: AxisTable) -> None:
    """Set `in_features`, `out_features`, `embedding_dim` and `normalized_shape` of every module that `table` names."""
    for (name, dim), size in table.dim_sizes().items():
        path, _, parameter = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = (size,)
        fields = next((fields for kind, fields in _FIELDS.items() if isinstance(module, kind)), {})
        if (parameter, dim) in fields:
            setattr(module, fields[parameter, dim], size)
