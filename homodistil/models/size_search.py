"""From "half as big" or "70M" to a stock shape: student.size and student.parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from homodistil.errors import UserError
from homodistil.models.axes import AxisTable, layer_widths
from homodistil.models.proposed_shapes import best_heads, possible_heads
from homodistil.models.shapes import target_widths
from homodistil.models.stock_shape import Shape, shape_of

_STEPS = ((512, 64), (128, 16), (0, 4))
"""(teacher's width from which on, multiple that student widths are): what matrix kernels like, as far as there is room.
"""


class SizedShape(NamedTuple):
    shape: Shape
    parameters: int
    """Of the student, tied ones counted once."""


def find_shape(
    table: AxisTable,
    shapes: Mapping[str, Sequence[int]],
    wanted: float,
    field: str,
    whole_heads: bool = False,
    whole: str = "the teacher",
) -> SizedShape:
    """The shape whose number of parameters is nearest to `wanted`, all widths in proportion to the teacher's.

    Args:
        table: of the teacher.
        shapes: parameter name -> shape, of all its parameters (of layers that stay), tied ones once.
        wanted: number of parameters.
        field: what the user gave it as, for messages.
        whole_heads: `ModelFamily.whole_heads`.
        whole: what the widest shape is, for messages.

    Raises:
        UserError: more than the teacher has, or less than the narrowest shape.
    """
    candidates = [SizedShape(shape, _count(table, shapes, shape)) for shape in _candidates(table, whole_heads)]
    smallest, largest = (size(c.parameters for c in candidates) for size in (min, max))
    if not 0.9 * smallest <= wanted <= largest:
        raise UserError(
            f"{field}: {wanted:,.0f} parameters are wanted, {whole} has {largest:,}; narrower widths alone lead to "
            f"{smallest:,} .. {largest:,} (layers and embeddings of all tokens stay); set a size between, or fewer "
            f"layers (student.num_hidden_layers) beside it"
        )
    return min(candidates, key=lambda candidate: abs(candidate.parameters - wanted))


def _candidates(table: AxisTable, whole_heads: bool) -> list[Shape]:
    """One shape for each hidden size, the teacher's own among them."""
    teacher = shape_of(table.widths)
    step = layer_widths(table.widths, 0).qk_dim if whole_heads else _step(teacher.hidden_size)
    sizes = [*range(step, teacher.hidden_size, step), teacher.hidden_size]
    shapes = [_in_proportion(size, teacher, table, whole_heads) for size in sizes]
    return [shape for shape in shapes if shape is not None]


def _in_proportion(hidden_size: int, teacher: Shape, table: AxisTable, whole_heads: bool) -> Shape | None:
    """None where no number of heads goes with this hidden size, or no stock class has it."""
    ratio, heads = hidden_size / teacher.hidden_size, possible_heads(hidden_size, table.widths, whole_heads)
    if hidden_size == table.widths.get("embedding") or not heads:
        return None
    num_heads = best_heads(heads, ratio, table.widths, whole_heads)
    step = _step(teacher.intermediate_size)
    neurons = max(step, round(ratio * teacher.intermediate_size / step) * step)
    return Shape(hidden_size, min(neurons, teacher.intermediate_size), num_heads)


def _step(width: int) -> int:
    return next(step for least, step in _STEPS if width >= least)


def _count(table: AxisTable, shapes: Mapping[str, Sequence[int]], shape: Shape) -> int:
    sizes = table.dim_sizes(target_widths(shape, table.widths))
    return sum(math.prod(sizes.get((n, dim), size) for dim, size in enumerate(dims)) for n, dims in shapes.items())
