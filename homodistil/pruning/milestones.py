"""Milestones: stock shapes that the widths pass exactly on their way, so that each is exported as it is
(training/milestone_exports.py).

A fraction of the teacher's hidden size becomes the nearest hidden size that a stock configuration can hold: a multiple
of the number of heads and of `pruning.width_multiple`. Heads and feed-forward widths are in proportion: as far on
their way to the student's final shape as the hidden size is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from homodistil.config.schema import PruningConfig, RunFolderConfig
from homodistil.errors import UserError
from homodistil.models.axes import Widths
from homodistil.models.shapes import target_widths
from homodistil.models.stock_shape import Shape, is_grouped, shape_of

_SAME_AS_FINAL = 0.02
"""How far below the student's final hidden size, as a share of it, a milestone may ask for and mean that size."""


class Milestone(NamedTuple):
    fraction: float
    """Share of the teacher's hidden size, as in run.export_milestones."""
    widths: dict[str, int]
    """Axis -> width, every axis of the student."""


class Route(NamedTuple):
    """Where the widths pass on their way."""

    milestones: tuple[Milestone, ...] = ()
    """Widest first; the last may be the student's final widths."""
    settle_steps: int = 0
    """Optimizer steps for which the widths of one are held before it is exported."""

    def on_the_way(self, target: Widths) -> tuple[Milestone, ...]:
        """Without the one that is the end of the way: the student settles there until training ends."""
        return tuple(m for m in self.milestones if m.widths["hidden"] > target["hidden"])

    def at_the_end(self, target: Widths) -> Milestone | None:
        return next((m for m in self.milestones if m.widths["hidden"] == target["hidden"]), None)


NO_MILESTONES = Route()


def plan_route(run: RunFolderConfig, pruning: PruningConfig, teacher: Widths, initial: Widths, target: Widths) -> Route:
    """The route of a run; empty where nothing is exported on the way.

    Args:
        teacher, initial, target: widths of the teacher, and of the student before and after.

    Raises:
        UserError: a milestone is not on the way from `initial` to `target`, or is another one too.
    """
    if not run.export_milestones:
        return NO_MILESTONES
    if is_grouped(teacher):
        raise UserError(
            f"run.export_milestones: found {run.export_milestones}, allowed is [] for a teacher whose query heads "
            f"share keys and values; train each size in a run of its own"
        )
    milestones: list[Milestone] = []
    before = shape_of(initial)
    for fraction in sorted(run.export_milestones, reverse=True):
        shape = milestone_shape(fraction, teacher["hidden"], (before, shape_of(target)), initial, pruning)
        if milestones and shape.hidden_size == before.hidden_size:
            raise UserError(
                f"run.export_milestones: {milestones[-1].fraction:g} and {fraction:g} of the teacher's "
                f"{teacher['hidden']} both mean hidden size {shape.hidden_size}; leave one out"
            )
        milestones.append(Milestone(fraction, target_widths(shape, initial)))
        before = shape
    return Route(tuple(milestones), run.settle_steps)


def milestone_shape(
    fraction: float, teacher_hidden: int, ends: tuple[Shape, Shape], initial: Widths, pruning: PruningConfig
) -> Shape:
    """The stock shape that `fraction` of `teacher_hidden` means.

    Args:
        ends: the shape before (the milestone before this one, or the start), and the student's final one.
        initial: widths of the start, which proportions refer to.

    Raises:
        UserError: not between the start and the final shape, or no stock shape lies between `ends`.
    """
    before, final = ends
    wanted, start = fraction * teacher_hidden, initial["hidden"]
    if wanted < final.hidden_size * (1 - _SAME_AS_FINAL) or wanted >= start:
        raise UserError(
            f"run.export_milestones: {fraction:g} of the teacher's hidden size {teacher_hidden} is {wanted:.0f}, and "
            f"this student goes from {start} to {final.hidden_size}; allowed: fractions between "
            f"{final.hidden_size / teacher_hidden:.3g} (the final size) and {start / teacher_hidden:.3g}"
        )
    if shape := _nearest(wanted, before, final, initial, pruning):
        return shape
    raise UserError(
        f"run.export_milestones: no hidden size between {final.hidden_size} and {before.hidden_size} near {wanted:.0f} "
        f"is a multiple of pruning.width_multiple ({pruning.width_multiple}) and of {final.num_attention_heads} .. "
        f"{before.num_attention_heads} heads no wider than before; leave {fraction:g} out or lower the multiple"
    )


def _nearest(wanted: float, before: Shape, final: Shape, initial: Widths, pruning: PruningConfig) -> Shape | None:
    """The final shape, or the stock shape nearest to `wanted`; of equally near ones the heads most in proportion."""
    start = shape_of(initial)
    widest = min(before.hidden_size, start.hidden_size - 1)
    stock = [(h, n) for h, n in _stock(widest, before, final, pruning) if h != initial.get("embedding")]
    between = [_filled(h, n, start, final, before, pruning) for h, n in stock]

    def distance(shape: Shape) -> tuple[float, float, int]:
        heads = _between(start.num_attention_heads, final.num_attention_heads, _left(shape.hidden_size, start, final))
        # Of two that are equally near the wider one; of two numbers of heads the larger one.
        return abs(shape.hidden_size - wanted), abs(shape.num_attention_heads - heads), -shape.num_attention_heads

    return min([final, *between], key=distance) if between or wanted <= final.hidden_size else None


def _stock(widest: int, before: Shape, final: Shape, pruning: PruningConfig) -> list[tuple[int, int]]:
    """(hidden size, heads) of all stock shapes between, whose heads are neither wider than before nor narrower than at
    the end. `widest`: largest hidden size."""
    shapes = []
    for heads in range(final.num_attention_heads, before.num_attention_heads + 1):
        multiple = math.lcm(heads, pruning.width_multiple)
        first = (final.hidden_size // multiple + 1) * multiple
        for hidden in range(first, widest + 1, multiple):
            if _head_dim(final) <= hidden // heads <= _head_dim(before):
                shapes.append((hidden, heads))
    return shapes


def _filled(hidden: int, heads: int, start: Shape, final: Shape, before: Shape, pruning: PruningConfig) -> Shape:
    exact = _between(start.intermediate_size, final.intermediate_size, _left(hidden, start, final))
    rounded = round(exact / pruning.ffn_multiple) * pruning.ffn_multiple
    return Shape(hidden, min(max(rounded, final.intermediate_size), before.intermediate_size), heads)


def _left(hidden: int, start: Shape, final: Shape) -> float:
    """Share of the way to the final hidden size that is left."""
    return (hidden - final.hidden_size) / (start.hidden_size - final.hidden_size)


def _between(first: int, last: int, left: float) -> float:
    return last + (first - last) * left


def _head_dim(shape: Shape) -> int:
    return shape.hidden_size // shape.num_attention_heads


def milestone_name(fraction: float) -> str:
    """`0.75`, as in folders and tables."""
    return f"{fraction:g}"
