"""Shapes that are proposed, or chosen where a size is left open: in proportion to the teacher's, with as many heads as
can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from homodistil.models.axes import Widths, layer_widths
from homodistil.models.stock_shape import Shape, is_grouped, shape_of


def half_of(widths: Widths, whole_heads: bool = False) -> Shape:
    """Half the teacher's width, with `best_heads`. An odd width is rounded down to one that fits.

    Args:
        widths: of the teacher.
    """
    teacher = shape_of(widths)
    hidden_size = max(layer_widths(widths, 0).qk_dim if whole_heads else 1, teacher.hidden_size // 2)
    while not (heads := possible_heads(hidden_size, widths, whole_heads)):
        hidden_size -= 1
    num_heads = best_heads(heads, 0.5, widths, whole_heads)
    return Shape(hidden_size, max(1, teacher.intermediate_size // 2), num_heads)


def best_heads(counts: Sequence[int], ratio: float, teacher: Widths, whole_heads: bool = False) -> int:
    """How many heads a student should have, of those that it can have.

    As many as there can be, each narrower: half of BERT-tiny's heads left a KL of .66, all of them at half their width
    .31, and half of MiniLM-L6 was nearer to its teacher, too (LOG.md). Heads that cannot get narrower, or whose number
    hangs together with that of their groups, become fewer in proportion.

    Args:
        counts: from `possible_heads`, one at least.
        ratio: the student's width over the teacher's.
    """
    if not (whole_heads or is_grouped(teacher)):
        return max(counts)
    wanted = ratio * layer_widths(teacher, 0).num_heads
    return min(counts, key=lambda count: (abs(count - wanted), -count))


def in_proportion(sizes: Mapping[str, int | None], widths: Widths, whole_heads: bool = False) -> Shape:
    """`sizes` (a name of `Shape` -> size, None: open) with what is open filled in; all open: `half_of` the teacher.

    The open ones shrink by as much as hidden_size does, or, where that is open, the number of heads or the neurons;
    a number of heads that is open is `best_heads`.
    Whether the teacher can be cut to the result is for `target_widths` to say.

    Args:
        widths: of the teacher.
    """
    teacher = shape_of(widths)
    order = ("hidden_size", "num_attention_heads", "intermediate_size")
    first = next((name for name in order if sizes[name] is not None), None)
    if first is None:
        return half_of(widths, whole_heads)
    ratio = sizes[first] / getattr(teacher, first)
    heads, wanted = sizes["num_attention_heads"], ratio * teacher.num_attention_heads
    hidden_size, intermediate_size = sizes["hidden_size"], sizes["intermediate_size"]
    if hidden_size is None:
        heads = heads or best_heads(_head_counts(widths), ratio, widths, whole_heads)
        most = teacher.hidden_size // heads if is_grouped(widths) else layer_widths(widths, 0).qk_dim
        in_head = most if whole_heads else min(most, max(1, round(ratio * teacher.hidden_size / heads)))
        hidden_size = heads * in_head
    if heads is None:
        possible = possible_heads(hidden_size, widths, whole_heads) or [max(1, round(wanted))]
        heads = best_heads(possible, ratio, widths, whole_heads)
    return Shape(hidden_size, intermediate_size or max(1, round(ratio * teacher.intermediate_size)), heads)


def possible_heads(hidden_size: int, teacher: Widths, whole_heads: bool = False) -> list[int]:
    """Numbers of heads that a student of `hidden_size` can have, ascending.

    They divide it, into heads no wider than the teacher's, or exactly so wide (`whole_heads`). Grouped heads keep their
    size; the classes of some families (Llama, Gemma 3) want a multiple of their number all the same.
    """
    head_dim = layer_widths(teacher, 0).qk_dim
    most, least = hidden_size if is_grouped(teacher) else head_dim, head_dim if whole_heads else 1
    counts = [count for count in _head_counts(teacher) if hidden_size % count == 0]
    return [count for count in counts if least <= hidden_size // count <= most]


def _head_counts(teacher: Widths) -> list[int]:
    """Numbers of heads to which the teacher can be cut: grouped ones leave equally many in each group."""
    layer = layer_widths(teacher, 0)
    if not is_grouped(teacher):
        return [*range(1, layer.num_heads + 1)]
    in_group = layer.num_heads // layer.num_kv_heads
    return sorted({g * r for g in range(1, layer.num_kv_heads + 1) for r in range(1, in_group + 1)})
