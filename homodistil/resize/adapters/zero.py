"""ZeRO stages 1 and 2: DeepSpeedZeroOptimizer, fp32 or bf16 (DeepSpeed 0.19, runtime/zero/stage_1_and_2.py).

Each parameter group is one flat, replicated buffer of model weights, and one partition per rank of the fp32 masters and
of every optimizer state. The tensor object of the master partition is the key of `optimizer.state` and an entry of
`param_groups`, so the object is kept and only its data changes. Everything that DeepSpeed derives from shapes is
derived again, by DeepSpeed's own methods where they exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Set

import torch
import torch.distributed as dist
from torch import Tensor, nn

from homodistil.resize.adapters.adapter import MasterSlice
from homodistil.resize.adapters.flat_adapter import FlatAdapter, padding_in_partition, renew_gradient_hooks
from homodistil.resize.adapters.fragments import drop_fragments, link_fragments, rebuild_fragments
from homodistil.resize.flat import FlatMove, Layout

PARAMETER_ALIGNMENT_BYTES = 16
"""Alignment of each parameter with DeepSpeed's `parameter_alignment`."""


class ZeroAdapter(FlatAdapter):
    masters_field = "single_partition_of_fp32_groups"
    weights_field = "bit16_groups_flat"
    params_field = "round_robin_bit16_groups"
    fields = {
        "optimizer": torch.optim.Optimizer,
        "bit16_groups": list,
        "bit16_groups_flat": list,
        "parallel_partitioned_bit16_groups": list,
        "single_partition_of_fp32_groups": list,
        "round_robin_bit16_groups": list,
        "round_robin_bit16_meta": list,
        "round_robin_bit16_padding": list,
        "round_robin_bit16_offsets": list,
        "round_robin_bit16_indices": list,
        "real_dp_process_group": list,
        "nccl_start_alignment_factor": int,
        "parameter_alignment": bool,
        "groups_padding": list,
        "partition_size": list,
        "params_in_partition": list,
        "params_not_in_partition": list,
        "first_offset": list,
        "is_param_in_current_partition": dict,
        "averaged_gradients": dict,
        "all_grad_tensors": dict,
        "extra_large_param_to_reduce": dict,
        "_hp_optimizer_states_linked": bool,
        "_param_slice_mappings": list,
        "_grad_acc_hooks": list,
    }

    def process_group(self, i: int) -> dist.ProcessGroup:
        return self.optimizer.real_dp_process_group[i]

    def layout(self, i: int) -> Layout:
        shapes = [tuple(meta.shape) for meta in self.optimizer.round_robin_bit16_meta[i]]
        return Layout.packed(shapes, dist.get_world_size(self.process_group(i)), *self.alignment(i))

    def alignment(self, i: int) -> tuple[int, int]:
        optimizer = self.optimizer
        element_bytes = optimizer.bit16_groups_flat[i].element_size()
        of_parameter = PARAMETER_ALIGNMENT_BYTES // math.gcd(PARAMETER_ALIGNMENT_BYTES, element_bytes)
        num_ranks = dist.get_world_size(self.process_group(i))
        return optimizer.nccl_start_alignment_factor * num_ranks, of_parameter if optimizer.parameter_alignment else 1

    def check_layout(self) -> None:
        optimizer = self.optimizer
        for i, master in enumerate(self.masters()):
            layout = self.layout(i)
            found_and_expected = {
                "round_robin_bit16_offsets": (list(optimizer.round_robin_bit16_offsets[i]), list(layout.offsets)),
                "round_robin_bit16_padding": (list(optimizer.round_robin_bit16_padding[i]), list(layout.padding())),
                "bit16_groups_flat": (self.weights(i).numel(), layout.numel),
                "partition_size": (optimizer.partition_size[i], layout.partition_numel),
                "single_partition_of_fp32_groups": (tuple(master.shape), (layout.partition_numel,)),
                "groups_padding": (optimizer.groups_padding[i], padding_in_partition(layout, self.rank(i))),
            }
            self.check_group(i, found_and_expected)

    def has_pending_gradients(self) -> bool:
        waiting = [*self.optimizer.averaged_gradients.values(), *self.optimizer.all_grad_tensors.values()]
        return any(entry is not None for entry in [*waiting, *(param.grad for param in self.parameters.values())])

    def drop_views(self) -> None:
        """Drop the fragments, which are views of the old weights, masters and moments."""
        drop_fragments(param for group in self.optimizer.bit16_groups for param in group)

    def forget(self, i: int, leaving: Set[nn.Parameter]) -> None:
        """Both orders of the group's parameters, which may be one list; numbers in one and the other follow."""
        optimizer = self.optimizer
        super().forget(i, leaving)
        in_order = optimizer.bit16_groups[i]
        in_order[:] = [param for param in in_order if param not in leaving]
        place = {param: number for number, param in enumerate(self.params(i))}
        optimizer.round_robin_bit16_indices[i] = [place[param] for param in in_order]
        for number, param in enumerate(in_order):
            param.param_idx_in_group = number

    def renumber(self) -> None:
        """Hooks on gradients hold a list of all parameters: made again."""
        renew_gradient_hooks(self.optimizer._grad_acc_hooks, self.optimizer.create_gradient_handling_hooks)

    def resize_group(self, i: int, move: FlatMove) -> int:
        bytes_moved = self.move_states(i, move) + self._rebuild_weights(i, move)
        self._rebuild_partition_info(i, move)
        return bytes_moved

    def _rebuild_weights(self, i: int, move: FlatMove) -> int:
        """Make the new flat buffer of model weights, with the parameters as views of it. Returns bytes sent."""
        optimizer = self.optimizer
        dtype, device = optimizer.bit16_groups_flat[i].dtype, optimizer.bit16_groups_flat[i].device
        for param in self.params(i):
            param.grad_accum = None
        self.release_weights(i)
        optimizer.parallel_partitioned_bit16_groups[i] = optimizer.bit16_groups_flat[i] = None
        optimizer.bit16_groups_flat[i] = torch.empty(move.new.numel, dtype=dtype, device=device)
        partitions = optimizer.get_data_parallel_partitions(optimizer.bit16_groups_flat[i], i)
        optimizer.parallel_partitioned_bit16_groups[i] = partitions
        optimizer.round_robin_bit16_meta[i] = [
            torch.empty(shape, dtype=dtype, device="meta") for shape in move.new.shapes
        ]
        optimizer.round_robin_bit16_padding[i] = list(move.new.padding())
        optimizer.round_robin_bit16_offsets[i] = list(move.new.offsets)
        bytes_moved = self.spread_weights(i, partitions)
        optimizer._update_model_bit16_weights(i)
        return bytes_moved

    def _rebuild_partition_info(self, i: int, move: FlatMove) -> None:
        """Update the partition tables of group `i` as in the constructor of the wrapper."""
        optimizer = self.optimizer
        rank, size = self.rank(i), move.new.partition_numel
        optimizer.groups_padding[i] = padding_in_partition(move.new, rank)
        optimizer.partition_size[i] = size
        inside, outside, first_offset = optimizer.get_partition_info(
            optimizer.round_robin_bit16_groups[i], size, rank, optimizer.round_robin_bit16_padding[i]
        )
        optimizer.params_in_partition[i], optimizer.params_not_in_partition[i] = inside, outside
        optimizer.first_offset[i] = first_offset

    def rebuild_maps(self) -> None:
        """Rebuild what DeepSpeed derives from all groups together, in the order of its constructor."""
        optimizer = self.optimizer
        for is_inside, groups in ((True, optimizer.params_in_partition), (False, optimizer.params_not_in_partition)):
            for param in (param for group in groups for param in group):
                optimizer.is_param_in_current_partition[optimizer.get_param_id(param)] = is_inside
        optimizer._release_ipg_buffers()
        optimizer.extra_large_param_to_reduce.clear()
        optimizer.averaged_gradients.clear()  # not replaced, because fragments refer to this dict
        optimizer.all_grad_tensors.clear()
        optimizer.initialize_gradient_partitioning_data_structures()
        optimizer.reset_partition_gradient_structures()
        rebuild_fragments(optimizer, self.masters())

    def weights_from_masters(self) -> None:
        for i, partitions in enumerate(self.optimizer.parallel_partitioned_bit16_groups):
            self.spread_weights(i, partitions)
        link_fragments(self.optimizer, self.masters())

    def gradients(self, i: int) -> Callable[[MasterSlice], Tensor]:
        averaged = self.optimizer.averaged_gradients.get(i)
        assert averaged is not None, "gradients exist only between engine.backward at the boundary and engine.step"
        at, position = {}, 0
        for gradient in averaged:  # fragments and padding, in the order of the partition
            at[position] = gradient
            position += gradient.numel()
        return lambda held: at[held.position]
