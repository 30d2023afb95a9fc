"""DeepSpeed's own views of masters, states and gradients (`param._hp_mapping`), for its safe_get_* functions.

ZeRO-1/2 and BF16_Optimizer share them. Fragments are views of the flat buffers: dropped before these are moved, so
that the old ones can go, and made anew afterwards by DeepSpeed's own methods.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def drop_fragments(params: Iterable[nn.Parameter]) -> None:
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
    # Not yet when a group has no state, i.e. before the first step: DeepSpeed links after that step by itself.
    if all(wrapper.optimizer.state.get(master) for master in masters):
        wrapper._lazy_init_hp_params_optimizer_state()


def rebuild_fragments(wrapper, masters: list[Tensor]) -> None:
    """After a resize: the fragments, and the map of them that goes into DeepSpeed's checkpoints."""
    link_fragments(wrapper, masters)
    wrapper._param_slice_mappings = wrapper._create_param_mapping()
