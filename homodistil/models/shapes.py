"""The student's final shape: presets of the paper and the checks that it can be cut from the teacher."""

from __future__ import annotations

from homodistil.config.schema import PruningConfig, StudentConfig
from homodistil.errors import UserError
from homodistil.models.axes import Widths, embedding_width, first_layers, kind_of, layer_widths, num_layers
from homodistil.models.classifier import CLASSIFIER_AXIS
from homodistil.models.family import ModelFamily
from homodistil.models.head_dim import with_head_dim
from homodistil.models.proposed_shapes import half_of
from homodistil.models.stock_shape import Shape, is_grouped, shape_of

PRESETS = {
    "quickstart": Shape(64, 256, 2),
    # HomoDistil, table 1 (design section 6): ffn = 4 x hidden; heads chosen so that a stock config can express them.
    "homobert-base": Shape(576, 2304, 12),
    "homobert-small": Shape(256, 1024, 8),
    "homobert-xsmall": Shape(240, 960, 12),
    "homobert-tiny": Shape(224, 896, 8),
}

NAMES = ("teacher", *PRESETS)
"""Names of all sizes that need no further field."""


def target_shape(student: StudentConfig, teacher: Widths, whole_heads: bool = False) -> Shape:
    """Preset with the fields that are set on top. Raises `UserError` when a custom shape is incomplete.

    Args:
        whole_heads: `ModelFamily.whole_heads`, for what is proposed then.
    """
    preset = shape_of(teacher) if student.preset == "teacher" else PRESETS.get(student.preset)
    values = [getattr(student, name) for name in Shape._fields]
    if preset is not None:
        return Shape(*(base if value is None else value for base, value in zip(preset, values, strict=True)))
    if None in values:
        raise _incomplete(student, teacher, whole_heads)
    return Shape(*values)


def _incomplete(student: StudentConfig, teacher: Widths, whole_heads: bool) -> UserError:
    """No target, or a part of one: says what is missing, and proposes it in the form to be typed."""
    missing = [name for name in Shape._fields if getattr(student, name) is None]
    half = half_of(teacher, whole_heads)._asdict()
    proposal = " ".join(f"student.{name}={half[name]}" for name in missing)
    # The presets' heads are narrower than those of common teachers.
    presets = "(or student.size=0.5)" if whole_heads else f"(or student.preset=NAME: {', '.join(NAMES)})"
    if len(missing) == len(Shape._fields):
        return UserError(f"student: no target size; for half of this teacher's width set {proposal} {presets}")
    given = ", ".join(f"{name}={getattr(student, name)}" for name in Shape._fields if name not in missing)
    return UserError(
        f"student.{', student.'.join(missing)}: not set beside {given}, and student.preset=custom needs all three; "
        f"half of this teacher's width is {proposal} {presets}"
    )


def student_widths(
    student: StudentConfig,
    teacher: Widths,
    sized: Shape | None = None,
    whole_heads: bool = False,
    all_layers: bool = False,
) -> tuple[dict[str, int], dict[str, int]]:
    """Axis -> width of the student as it starts, and as it ends, for every axis that it starts with.

    A copy starts with the teacher's widths; one of fewer layers has the axes of that many. Fresh weights have the
    target's widths from the start.

    Args:
        teacher: widths, alike in all layers.
        sized: the target where student.size or student.parameters say how large it is to be.
        whole_heads: `ModelFamily.whole_heads`.
        all_layers: the student starts with all layers of the teacher, and some leave later.

    Raises:
        UserError: as `target_shape` and `target_widths`.
    """
    layers = num_layers(teacher)
    if student.num_hidden_layers and not all_layers:
        layers = student.num_hidden_layers
    widths = first_layers(teacher, layers)
    shape = sized or target_shape(student, teacher, whole_heads)
    target = target_widths(shape, widths, student.num_key_value_heads, whole_heads)
    target = with_head_dim(target, student.head_dim)
    return (target if student.init == "random" else widths), target


def target_widths(
    shape: Shape, teacher: Widths, num_key_value_heads: int | None = None, whole_heads: bool = False
) -> dict[str, int]:
    """Axis -> final width for every axis of the teacher.

    Args:
        num_key_value_heads: groups of query heads, of a teacher that has such; None: as many as fit.
        whole_heads: `ModelFamily.whole_heads`.

    Raises:
        UserError: wider than the teacher, or not expressible by a stock configuration.
    """
    _check_limits(shape, teacher)
    _check_embedding(shape, teacher)
    if whole_heads:
        _check_whole_heads(shape, teacher)
    of_kind = {"hidden": shape.hidden_size, "ffn": shape.intermediate_size, "embedding": embedding_width(teacher)}
    of_kind[CLASSIFIER_AXIS] = shape.hidden_size  # as stock configurations have it
    heads = _grouped_heads if is_grouped(teacher) else _plain_heads
    of_kind |= heads(shape, teacher, num_key_value_heads)
    return {axis: of_kind[kind_of(axis)] for axis in teacher}


def check_stock(family: ModelFamily, target: Widths, teacher: Widths) -> None:
    """Raise `UserError` where no stock configuration of `family` can hold `target`, with the nearest hidden sizes."""
    if family.stock_head_dim(target) is not None:
        return
    sizes = [h for h in range(1, teacher["hidden"] + 1) if family.stock_head_dim({**target, "hidden": h}) is not None]
    nearest = sorted(sorted(sizes, key=lambda size: abs(size - target["hidden"]))[:2])
    raise UserError(
        f"student.hidden_size: found {target['hidden']} with {layer_widths(target, 0).num_heads} heads, which no stock "
        f"configuration of {family.name} holds: it wants a multiple of the heads; nearest are "
        f"{' and '.join(map(str, nearest))} (or set another student.num_attention_heads)"
    )


def _grouped_heads(shape: Shape, teacher: Widths, num_key_value_heads: int | None) -> dict[str, int]:
    """Kind of axis -> target width where query heads are grouped."""
    num_heads, layer = shape.num_attention_heads, layer_widths(teacher, 0)
    in_group = layer.num_heads // layer.num_kv_heads
    fitting = [g for g in range(1, layer.num_kv_heads + 1) if num_heads % g == 0 and num_heads // g <= in_group]
    wanted = max(fitting, default=0) if num_key_value_heads is None else num_key_value_heads
    if wanted not in fitting:
        possible = {g: [g * r for r in range(1, in_group + 1)] for g in range(1, layer.num_kv_heads + 1)}
        counts = sorted(
            {count for g, counts in possible.items() if num_key_value_heads in (None, g) for count in counts}
        )
        is_open = num_key_value_heads is None
        field, given = ("num_attention_heads", num_heads) if is_open else ("num_key_value_heads", num_key_value_heads)
        raise UserError(
            f"student.{field}: found {given} (with num_attention_heads {num_heads}); the "
            f"teacher has {layer.num_kv_heads} groups of {in_group} query heads, of which equally many stay in each; "
            f"allowed numbers of heads are {', '.join(map(str, counts)) or 'none for so many groups'}"
        )
    return {
        "kv_heads": wanted,
        "heads_in_group": num_heads // wanted,
        "qk_dim": layer.qk_dim,
        "vo_dim": layer.vo_dim,
        "head_norm": layer.qk_dim,
    }


def _plain_heads(shape: Shape, teacher: Widths, num_key_value_heads: int | None) -> dict[str, int]:
    """Kind of axis -> target width where every head has its own keys and values, and hidden = heads x head size."""
    if num_key_value_heads not in (None, shape.num_attention_heads):
        raise UserError(
            f"student.num_key_value_heads: found {num_key_value_heads}, but every head of this teacher has keys and "
            f"values of its own; leave it out"
        )
    _check_head_size(shape, teacher)
    head_dim = shape.hidden_size // shape.num_attention_heads
    return {"heads": shape.num_attention_heads, "qk_dim": head_dim, "vo_dim": head_dim}


def _check_limits(shape: Shape, teacher: Widths) -> None:
    for name, wanted, limit in zip(Shape._fields, shape, shape_of(teacher), strict=True):
        if not 1 <= wanted <= limit:
            raise UserError(
                f"student.{name}: found {wanted}, the teacher has {limit}; allowed 1 .. {limit} "
                f"(a student is cut out of its teacher; choose a smaller value or another teacher)"
            )


def _check_whole_heads(shape: Shape, teacher: Widths) -> None:
    head_dim, most = layer_widths(teacher, 0).qk_dim, shape_of(teacher).num_attention_heads
    if shape.hidden_size != shape.num_attention_heads * head_dim:
        heads = min(max(1, round(shape.hidden_size / head_dim)), most)
        raise UserError(
            f"student.hidden_size: found {shape.hidden_size} with student.num_attention_heads "
            f"{shape.num_attention_heads}, but heads of this teacher keep their {head_dim} dims (rotary positions) and "
            f"its stock class has hidden_size = heads x {head_dim}; nearest is student.hidden_size={heads * head_dim} "
            f"student.num_attention_heads={heads}"
        )


def _check_embedding(shape: Shape, teacher: Widths) -> None:
    if shape.hidden_size == teacher.get("embedding"):
        step = shape.num_attention_heads
        raise UserError(
            f"student.hidden_size: found {shape.hidden_size}, the width of the teacher's embeddings, which stay as "
            f"they are: the stock class has no linear between embeddings and layers where both are equal; use "
            f"{shape.hidden_size - step} or {shape.hidden_size + step}, or student.size=0.5, which avoids it"
        )


def _check_head_size(shape: Shape, teacher: Widths) -> None:
    if shape.hidden_size % shape.num_attention_heads:
        raise UserError(
            f"student.hidden_size: {shape.hidden_size} is not divisible by student.num_attention_heads "
            f"{shape.num_attention_heads}; stock configurations need hidden_size = heads x head size"
        )
    head_dim, limit = shape.hidden_size // shape.num_attention_heads, layer_widths(teacher, 0).qk_dim
    if head_dim > limit:
        raise UserError(
            f"student.num_attention_heads: {shape.num_attention_heads} heads of hidden_size {shape.hidden_size} are "
            f"{head_dim} wide, the teacher's {limit}; use at least {-(-shape.hidden_size // limit)} heads"
        )


def check_multiples(pruning: PruningConfig, widths: Widths) -> None:
    """Raise `UserError` for a multiple above the teacher's own width, of which no width on the way could be one."""
    limits = {
        "width_multiple": (widths["hidden"], "hidden size"),
        "ffn_multiple": (layer_widths(widths, 0).intermediate_size, "feed-forward width"),
        "head_dim_multiple": (layer_widths(widths, 0).qk_dim, "head size"),
    }
    for name, (width, what) in limits.items():
        multiple = getattr(pruning, name)
        if pruning.schedule not in ("none", "one_shot") and multiple > width:
            raise UserError(
                f"pruning.{name}: found {multiple}, allowed are 1 .. {width} (the teacher's {what}); set a smaller one"
            )
