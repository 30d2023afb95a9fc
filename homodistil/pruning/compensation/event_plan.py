"""What an event does to every parameter: selections, rotations of heads, and the residual stream's projection."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from homodistil.data.batch import Batch
from homodistil.distributed import ranks
from homodistil.models.axes import AxisTable, Keep, compose, outer_axes
from homodistil.models.family import ModelFamily
from homodistil.models.resize_plan import ResizePlan, make_plan, slice_module
from homodistil.pruning.compensation.axis_maps import AxisMaps, layer_of, leading
from homodistil.pruning.compensation.basis_distance import BasisDistance
from homodistil.pruning.compensation.learned_basis import train_basis
from homodistil.pruning.compensation.options import Options
from homodistil.pruning.compensation.projection import residual_projection
from homodistil.pruning.compensation.refit import Refit
from homodistil.pruning.compensation.statistics import Statistics, collect
from homodistil.pruning.compensation.uneven_gains import uneven_dims


class Network(NamedTuple):
    """The network before an event."""

    model: nn.Module
    """Frozen, in evaluation mode."""
    family: ModelFamily
    table: AxisTable
    origins: Keep | None
    """Where its entries came from (`ModelFamily.follow_origins`); None: from itself."""

    def cut(self, plan: ResizePlan) -> nn.Module:
        """A new network, as `plan` has it."""
        new = copy.deepcopy(self.model)
        slice_module(new, plan)
        self.family.refresh(new, plan.widths_after)
        if self.origins is not None:
            self.family.follow_origins(new, compose(self.origins, plan.keep, outer_axes(self.table.widths)))
        return new


def plan_event(
    network: Network,
    keep: Keep,
    mapped: Sequence[str],
    batches: Sequence[Batch],
    options: Options,
    fixed_dims: Tensor | None,
) -> tuple[ResizePlan, Statistics | None]:
    """The event's plan, and what a projection was chosen by.

    Args:
        mapped: axes that are rotated or projected.
    """
    model, family, table, _ = network
    if not mapped:
        return make_plan(table, keep), None
    heads = [axis for axis in mapped if axis != "hidden"]
    can_weigh = family.has_head(model) or options.pooling is not None or options.logits is not None
    basis = _closed_form(options, can_weigh) if "hidden" in mapped else None
    layers = {layer_of(axis) for axis in heads}
    statistics = collect(model, family, batches, layers, basis, options.seed, options.pooling, options.logits)
    kept = {axis: leading(table, keep, axis) if axis in mapped else keep[axis] for axis in keep}
    maps = AxisMaps(model, family, table, keep)
    for axis in heads:
        maps.rotate(axis, statistics.heads[layer_of(axis)])
    if "hidden" in mapped:
        _project(network, kept, maps, statistics, batches, options, fixed_dims)
    return make_plan(table, kept, maps.by_parameter), statistics


def _project(
    network: Network,
    kept: Keep,
    maps: AxisMaps,
    statistics: Statistics,
    batches: Sequence[Batch],
    options: Options,
    fixed_dims: Tensor | None,
) -> None:
    """Give `maps`, which have those of the heads, the residual stream's projection."""
    width, table = len(kept["hidden"]), network.table
    fixed = _fixed_dims(network, statistics, fixed_dims, width)
    projection = ranks.from_first(residual_projection(statistics, width, fixed, options.seed))
    maps.project(projection)
    if options.basis == "learned" and width < table.widths["hidden"]:  # a rotation leaves nothing out
        start = make_plan(table, kept, maps.by_parameter)
        maps.project(_trained(network, start, projection, fixed, batches, options, statistics.decoder))


def _closed_form(options: Options, can_weigh: bool) -> str:
    """The basis that is used, or that the training of one begins with."""
    if options.basis != "learned":
        return options.basis
    return "fisher" if can_weigh else "pca"


def _trained(
    network: Network,
    plan: ResizePlan,
    projection: Tensor,
    fixed: Tensor,
    batches: Sequence[Batch],
    options: Options,
    decoder_gram: Tensor | None,
) -> Tensor:
    """The projection after training, begun with that of `plan`, whose norms are fitted first: those of a post-norm
    model would have a wrong scale otherwise, and the gradient would tell of little else."""
    new = network.cut(plan)
    Refit(network.model, new, network.family, plan, batches, options.ridge, fits_linears=False).run()
    distance = BasisDistance(network.model, new, network.family, network.table, plan, batches, decoder_gram)
    return train_basis(distance, projection, fixed, options.basis_steps, options.basis_lr)


def _fixed_dims(network: Network, statistics: Statistics, wanted: Tensor | None, width: int) -> Tensor:
    """Residual dims that stay coordinates: those that are wanted, which come first, as later events count on it; then
    what the final norm's gain asks for, up to half of the new width."""
    device = statistics.residual[0].sums.device
    fixed = (torch.empty(0, dtype=torch.int64) if wanted is None else wanted).to(device)
    final = network.family.norm(network.family.final_norm(network.model))
    if final is None:
        return fixed
    uneven = uneven_dims(final, statistics.residual[-1], most=max(0, width // 2 - len(fixed)))
    return torch.cat([fixed, uneven[~torch.isin(uneven, fixed)]])
