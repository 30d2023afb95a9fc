"""Compensated width cuts: what a resize event takes away, the rest of the network makes up for, in closed form.

`compensate` turns the widths that are due into a plan (selections and linear maps) and the weights after it. Modes:
refit: entries are selected by importance, then every remaining part is fitted by least squares to what it put out;
full: heads are rotated so that their leading dims matter most (not those with rotary positions), the residual stream is
projected onto its best subspace, neurons and whole heads are selected, then the same fit; project: as full, but norms
and the vocabulary head alone are fitted, as without their scale a projection is worth nothing, and linears keep what
it has made of them. It works on plain stock models; bringing the result to a live engine is the caller's part
(student.py). Source: compensation study, sections 4 and 5.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from homodistil.data.batch import Batch
from homodistil.models.axes import AxisTable, Keep
from homodistil.models.family import ModelFamily
from homodistil.models.resize_plan import ResizePlan
from homodistil.pruning.compensation.axis_maps import is_mapped
from homodistil.pruning.compensation.event_plan import Network, plan_event
from homodistil.pruning.compensation.folding import fold_gains
from homodistil.pruning.compensation.options import Options
from homodistil.pruning.compensation.refit import Refit
from homodistil.pruning.compensation.whole_network import frozen, refit_network


class Compensated(NamedTuple):
    plan: ResizePlan
    model: nn.Module
    """A new model at the new widths, refitted; in evaluation mode, its parameters frozen."""
    report: dict[str, float]
    """seconds: wall time; lost: share of the variance of the last hidden states, as the plan has them, that the new
    network's do not explain."""


def compensate(
    model: nn.Module,
    family: ModelFamily,
    table: AxisTable,
    keep: Keep,
    batches: Sequence[Batch],
    options: Options,
    fixed_dims: Tensor | None = None,
    origins: Keep | None = None,
) -> Compensated:
    """One event, compensated. Every rank calls it and gets the same bits.

    Args:
        model: the current network, a plain fp32 language model or backbone with tapped attention; not changed.
        family: its table of names.
        table: axes at the current widths, by the names of `model.named_parameters()`.
        keep: selection by importance for the axes that are due. project, full: of `hidden`, and of `qk_dim` and
            `vo_dim` where heads are rotated, only the widths count.
        batches: this rank's calibration micro-batches on the model's device, one at least.
        fixed_dims: project, full: int64, residual dims that stay coordinate axes; in the new network they come first.
        origins: where the entries of `model` came from (`ModelFamily.follow_origins`); None: from itself.

    Raises:
        ValueError: a keep that does not fit the table; no more dims than fixed ones.
    """
    start_s = time.perf_counter()
    mapped = [axis for axis in keep if options.maps and is_mapped(axis, model, family)]
    if "hidden" in mapped:
        model = copy.deepcopy(model)
        fold_gains(model, family)
    with frozen(model):
        network = Network(model, family, table, origins)
        plan, statistics = plan_event(network, keep, mapped, batches, options, fixed_dims)
        new = network.cut(plan)
        refit = Refit(model, new, family, plan, batches, options.ridge, options.fits_linears)
        lost = refit_network(refit, statistics.decoder if statistics else None)
    return Compensated(plan, new, {"seconds": time.perf_counter() - start_s, "lost": lost})


def rotation_only(
    model: nn.Module,
    family: ModelFamily,
    table: AxisTable,
    batches: Sequence[Batch],
    options: Options,
    fixed_dims: Tensor | None = None,
) -> Compensated:
    """The model with its residual stream rotated at full width, and refitted: what rotating alone costs (LayerNorm's
    gammas do not commute with it). Arguments as of `compensate`."""
    keep = {"hidden": torch.arange(table.widths["hidden"])}
    return compensate(model, family, table, keep, batches, options, fixed_dims)
