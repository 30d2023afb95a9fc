"""Where activations run over the axes of a model, read off its axis table."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from homodistil.models.axes import AxisTable
from homodistil.models.module_sizes import input_dim


class Reader(NamedTuple):
    """A linear whose inputs run over `axes`, the last one fastest."""

    module: nn.Module
    axes: tuple[str, ...]


def readers(model: nn.Module, backbone: nn.Module, table: AxisTable) -> list[Reader]:
    """Linears inside `backbone` that read something else than the residual stream: what follows from a block's own
    axes enters them.

    Args:
        table: of `model`.
    """
    inside, chosen = set(backbone.modules()), []
    for use in table.uses:
        path, _, name = use.parameter.rpartition(".")
        module = model.get_submodule(path)
        if name == "weight" and use.dim == input_dim(module) and use.axes != ("hidden",) and module in inside:
            chosen.append(Reader(module, use.axes))
    return chosen


def query_key_axes(table: AxisTable, layer: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Axes of all queries and of all keys of `layer`, head by head: of grouped heads there are more queries."""
    over = {use.axes for use in table.uses if use.axes[-1] == f"layer.{layer}.qk_dim"}
    return max(over, key=len), min(over, key=len)
