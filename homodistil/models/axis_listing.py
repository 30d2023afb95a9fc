"""The axis table as text: what each axis couples, that is, which parameters lose something when one entry goes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from homodistil.models.axes import AxisTable, AxisUse

Shapes = Mapping[str, Sequence[int]]
"""Parameter name -> shape."""

LEGEND = """\
* stands for the number of a layer. In brackets: the parameter's dimensions, by the axes that they run over (a plain
number never shrinks; heads*qk_dim is laid out head by head). An entry of qk_dim or vo_dim is one dim in every head."""


def axis_listing(table: AxisTable, shapes: Shapes) -> str:
    """One paragraph per kind of axis: its width, the parameters that one entry is made of, and where these are.

    Args:
        table: of the model whose parameters have `shapes`.
    """
    groups: dict[str, list[str]] = {}
    for axis in table.widths:
        groups.setdefault(_pattern(axis), []).append(axis)
    return "\n\n".join(_paragraph(pattern, axes, table, shapes) for pattern, axes in groups.items())


def entry_parameters(axis: str, table: AxisTable, shapes: Shapes) -> int:
    """Parameters that go with one entry of `axis`, from all that it couples."""
    narrower = table.with_widths({axis: table.widths[axis] - 1})
    names = {use.parameter for use in table.uses if axis in use.axes}
    return sum(_num_values(name, table, shapes) - _num_values(name, narrower, shapes) for name in names)


def _num_values(parameter: str, table: AxisTable, shapes: Shapes) -> int:
    sizes = list(shapes[parameter])
    for (name, dim), size in table.dim_sizes().items():
        if name == parameter:
            sizes[dim] = size
    return math.prod(sizes)


def _paragraph(pattern: str, axes: list[str], table: AxisTable, shapes: Shapes) -> str:
    widths = _span([table.widths[axis] for axis in axes])
    cost = _span([entry_parameters(axis, table, shapes) for axis in axes])
    layers = f" in each of {len(axes)} layers" if "*" in pattern else ""
    head = f"{pattern}: {widths} entries{layers}; one entry is {cost} parameters"
    lines: dict[tuple[str, str], int] = {}
    for name in dict.fromkeys(use.parameter for use in table.uses if set(use.axes) & set(axes)):
        line = (_pattern(name), _dims(name, table.uses, shapes[name]))
        lines[line] = lines.get(line, 0) + 1
    longest = max(len(name) for name, _ in lines)
    return "\n".join([head, *(f"  {name.ljust(longest)}  {dims}" for name, dims in lines)])


def _dims(parameter: str, uses: Sequence[AxisUse], shape: Sequence[int]) -> str:
    blocks: dict[int, list[str]] = {}
    for use in uses:
        if use.parameter == parameter:
            blocks.setdefault(use.dim, []).append("*".join(axis.rsplit(".", 1)[-1] for axis in use.axes))
    names = [" + ".join(blocks.get(dim, [str(size)])) for dim, size in enumerate(shape)]
    return f"[{', '.join(names)}]"


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
