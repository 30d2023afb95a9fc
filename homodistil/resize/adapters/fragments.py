"""DeepSpeed's own views of masters, states and gradients (`param._hp_mapping`), for its safe_get_* functions.

ZeRO-1/2 and BF16_Optimizer have them. These fragments are views of the flat buffers. They are dropped before the
buffers are moved, so that the old buffers can be freed, and made again by DeepSpeed's own methods.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def drop_fragments(params: Iterable[nn.Parameter]) -> None:
    """Remove the views from `params`."""
    for param in params:
        param._hp_mapping = None


def link_fragments(wrapper, masters: list[Tensor]) -> None:
    """Set the views of masters, states and gradients that DeepSpeed's safe_get_* functions read.

    Args:
        wrapper: DeepSpeedZeroOptimizer or BF16_Optimizer.
        masters: its fp32 partitions, one per parameter group.
    """
    wrapper._link_all_hp_params()
    wrapper._hp_optimizer_states_linked = False
    # Only if all groups have a state: before the first step they have none, and DeepSpeed links them after that step.
    if all(wrapper.optimizer.state.get(master) for master in masters):
        wrapper._lazy_init_hp_params_optimizer_state()


def rebuild_fragments(wrapper, masters: list[Tensor]) -> None:
    """Make the views again after a resize, and the table of them that DeepSpeed saves in its checkpoints."""
    link_fragments(wrapper, masters)
    wrapper._param_slice_mappings = wrapper._create_param_mapping()
