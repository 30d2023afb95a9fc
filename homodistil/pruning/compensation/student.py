"""From "this is what stays" to a compensated event of the whole student: its plan, and the weights after it.

compensation/ works on the stock model alone; here its result gets the student's names, and the distillation projections
follow the residual stream. Nothing is applied: a change may be a trial. Knows plain students only;
homodistil/training/shrinkable.py applies a change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from homodistil.data.batch import Batch
from homodistil.distill.losses.pooled import PROJECTION
from homodistil.distill.student import Student
from homodistil.models.axes import Keep
from homodistil.models.resize_plan import DimMaps, ResizePlan, make_plan
from homodistil.pruning.compensation import Compensated, Options, compensate
from homodistil.pruning.compensation.depth import compensate_layers
from homodistil.pruning.compensation.vectors import fit_projection

_VECTORS_WEIGHT = f"projections.{PROJECTION}.weight"


@dataclass(frozen=True)
class EventChange:
    """One event, the same on every rank."""

    plan: ResizePlan
    """By the student's parameter names."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """The student's parameter name -> value after the plan and the refit, full, fp32; {} where nothing is refitted."""
    report: dict[str, float] = field(default_factory=dict)
    """What compensation tells of itself, for the event's line."""


def propose(student: Student, keep: Keep, batches: Sequence[Batch], options: Options, fixed: Tensor) -> EventChange:
    """The compensated event that leaves `keep`. Every rank calls it.

    Args:
        student: plain, fp32; not changed.
        keep: selection by importance for the axes that are due; of axes that get a map only the width counts.
        batches: this rank's calibration micro-batches, on the student's device.
        fixed: residual dims (the current numbering) that stay coordinates, int64 (k,), ascending.
    """
    table = student.family.axis_table(student.model)
    compensated = compensate(student.model, student.family, table, keep, batches, options, fixed, student.origins)
    maps: dict[str, DimMaps] = {f"model.{name}": dims for name, dims in compensated.plan.maps.items()}
    maps |= _projection_maps(student, compensated.plan)
    weights = _weights(student, compensated, batches, options)
    return EventChange(make_plan(student.axis_table(), compensated.plan.keep, maps), weights, compensated.report)


def propose_layers(student: Student, kept: Sequence[int], batches: Sequence[Batch], options: Options) -> EventChange:
    """The compensated event after which all layers have left but `kept`. Every rank calls it.

    The plan cuts nothing; names in `weights` are those after the event, when layers have got their new numbers.

    Args:
        student, batches: as of `propose`.
        kept: ascending, with 0.
    """
    compensated = compensate_layers(student.model, student.family, kept, batches, options)
    weights = _weights(student, compensated, batches, options)
    return EventChange(make_plan(student.axis_table(), {}), weights, compensated.report)


def _weights(
    student: Student, compensated: Compensated, batches: Sequence[Batch], options: Options
) -> dict[str, Tensor]:
    """`EventChange.weights`: the model's, and the W of vectors where there is one."""
    weights = {f"model.{name}": parameter.detach() for name, parameter in compensated.model.named_parameters()}
    if options.pooling is not None and PROJECTION in student.projections:
        weights[_VECTORS_WEIGHT] = _fitted_projection(student, compensated, batches, options)
    return weights


def _fitted_projection(
    student: Student, compensated: Compensated, batches: Sequence[Batch], options: Options
) -> Tensor:
    """W of the vectors after the event, (E, d): contracted as the stream is, then fitted to what vectors were."""
    weight, plan = student.projections[PROJECTION].weight.detach(), compensated.plan
    residual = residual_map(student, plan)
    if residual is not None:
        start = weight @ residual.to(weight)
    else:
        start = weight[:, plan.keep["hidden"].to(weight.device)] if "hidden" in plan.keep else weight
    projection = nn.Linear(start.shape[1], start.shape[0], bias=False, device=start.device, dtype=start.dtype)
    projection.weight.data = start.clone()
    models = student.model, compensated.model
    fit_projection(projection, weight, models, student.family, batches, options.pooling, options.ridge)
    return projection.weight.detach()


def _projection_maps(student: Student, plan: ResizePlan) -> dict[str, DimMaps]:
    """The student's side of every W, contracted as the residual stream is: W' = W P."""
    residual = residual_map(student, plan)
    if residual is None:
        return {}
    uses = [use for use in student.axis_table().uses if use.parameter.startswith("projections.")]
    return {use.parameter: {use.dim: residual} for use in uses}


def residual_map(student: Student, plan: ResizePlan) -> Tensor | None:
    """P (old width, new width) of a plan for `student.model`; None when the residual stream is not mapped."""
    for use in student.family.axis_table(student.model).uses:
        # A vector may be a LayerNorm's weight, which has P squared.
        if use.axes == ("hidden",) and student.model.get_parameter(use.parameter).ndim == 2:
            return plan.maps.get(use.parameter, {}).get(use.dim)
    return None
