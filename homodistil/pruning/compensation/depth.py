"""Compensated depth: the blocks in front of layers that leave take over what these did, in closed form.

The last block of a kept layer is fitted to the residual stream behind the last of the layers that leave directly after
it (one linear for all of them: ReplaceMe, arXiv 2505.02819, fits that linear alone); every later part then makes up for
what is still missing, as after a cut of widths (refit.py).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

from torch import nn

from homodistil.data.batch import Batch
from homodistil.models.family import ModelFamily
from homodistil.models.resize_plan import make_plan
from homodistil.pruning.compensation import Compensated
from homodistil.pruning.compensation.options import Options
from homodistil.pruning.compensation.refit import Refit
from homodistil.pruning.compensation.whole_network import frozen, refit_network


def compensate_layers(
    model: nn.Module, family: ModelFamily, kept: Sequence[int], batches: Sequence[Batch], options: Options
) -> Compensated:
    """The event in which all layers leave but `kept`, compensated. Every rank calls it and gets the same bits.

    Args:
        model: as of `compensate`.
        kept: ascending, with 0.
        batches: this rank's calibration micro-batches on the model's device, one at least.
        options: nothing is rotated or projected, whatever the mode.
    """
    start_s = time.perf_counter()
    with frozen(model):
        new = copy.deepcopy(model)
        family.keep_layers(new, kept)
        plan = make_plan(family.axis_table(model), {})
        refit = Refit(model, new, family, plan, batches, options.ridge, options.fits_linears, kept)
        lost = refit_network(refit, None)
    return Compensated(plan, new, {"seconds": time.perf_counter() - start_s, "lost": lost})
