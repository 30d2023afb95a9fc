"""ZeRO-1 in bf16 with gradients accumulated in fp32: BF16_Optimizer (DeepSpeed 0.19, runtime/bf16_optimizer.py).

As in ZeRO-1/2, a parameter group is one flat buffer of bf16 weights and one fp32 partition per rank of masters and
states. In addition every rank holds the fp32 gradients of the whole group in one buffer with many views. Between steps
this buffer is zero, so it is freed before an event and made again afterwards; an event thus needs no more memory than
training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from homodistil.resize.adapters.adapter import MasterSlice
from homodistil.resize.adapters.flat_adapter import FlatAdapter, renew_gradient_hooks
from homodistil.resize.adapters.fragments import drop_fragments, link_fragments, rebuild_fragments
from homodistil.resize.flat import FlatMove, Layout


class Bf16Adapter(FlatAdapter):
    masters_field = "fp32_groups_flat_partition"
    weights_field = "bf16_groups_flat"
    params_field = "bf16_groups"
    fields = {
        "optimizer": torch.optim.Optimizer,
        "bf16_groups": list,
        "bf16_groups_flat": list,
        "bf16_partitioned_groups": list,
        "fp32_groups_flat_partition": list,
        "fp32_groups_gradients": list,
        "fp32_groups_gradient_dict": dict,
        "fp32_groups_gradients_flat": list,
        "fp32_groups_actual_gradients_flat": list,
        "fp32_groups_gradient_flat_partition": list,
        "fp32_groups_has_gradients": list,
        "non_expert_gradients": list,
        "group_paddings": list,
        "real_dp_process_group": list,
        "nccl_start_alignment_factor": int,
        "grad_acc_dtype": torch.dtype,
        "_hp_optimizer_states_linked": bool,
        "_param_slice_mappings": list,
        "_muon_exchange_layouts": list,
        "_grad_acc_hooks": list,
    }

    def process_group(self, i: int) -> dist.ProcessGroup:
        return self.optimizer.real_dp_process_group[i]

    def layout(self, i: int) -> Layout:
        shapes = [tuple(param.shape) for param in self.params(i)]
        return Layout.packed(shapes, dist.get_world_size(self.process_group(i)), *self.alignment(i))

    def alignment(self, i: int) -> tuple[int, int]:
        return self.optimizer.nccl_start_alignment_factor * dist.get_world_size(self.process_group(i)), 1

    def check_layout(self) -> None:
        optimizer = self.optimizer
        for i, master in enumerate(self.masters()):
            layout, gradients = self.layout(i), optimizer.fp32_groups_gradients_flat[i]
            found_and_expected = {
                "bf16_groups_flat": (self.weights(i).numel(), layout.numel),
                "fp32_groups_flat_partition": (tuple(master.shape), (layout.partition_numel,)),
                "group_paddings": (optimizer.group_paddings[i], _group_padding(layout, self.rank(i))),
                "fp32_groups_gradients_flat": (gradients.numel(), layout.numel),
                "fp32_groups_gradients": (
                    [view.storage_offset() for view in optimizer.fp32_groups_gradients[i]],
                    list(layout.offsets),
                ),
                "non_expert_gradients": (optimizer.non_expert_gradients[i].data_ptr(), gradients.data_ptr()),
                "_muon_exchange_layouts": (optimizer._muon_exchange_layouts[i], None),
            }
            self.check_group(i, found_and_expected)

    def has_pending_gradients(self) -> bool:
        has_gradients = any(any(group) for group in self.optimizer.fp32_groups_has_gradients)
        return has_gradients or any(param.grad is not None for param in self.parameters.values())

    def gradients(self, i: int) -> Callable[[MasterSlice], Tensor]:
        local = self.optimizer.fp32_groups_gradient_flat_partition[i]
        return lambda held: local[held.position : held.position + held.numel]

    def drop_views(self) -> None:
        """Drop all references to the gradient buffers and the old weights, masters and moments."""
        drop_fragments(param for group in self.optimizer.bf16_groups for param in group)
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        optimizer = self.optimizer
        for param in (param for group in optimizer.bf16_groups for param in group):
            param._hp_grad = None  # safe_get_full_grad would use it
        for master in self.masters():
            master.grad = None  # a view of the gradient buffer that stays set between steps
        optimizer.non_expert_gradients.clear()
        optimizer.fp32_groups_gradient_dict.clear()
        for views in (
            optimizer.fp32_groups_gradients_flat,
            optimizer.fp32_groups_gradients,
            optimizer.fp32_groups_actual_gradients_flat,
            optimizer.fp32_groups_gradient_flat_partition,
        ):
            views[:] = [None] * len(views)

    def renumber(self) -> None:
        """Hooks on gradients know a parameter by its number in the group: made again."""
        renew_gradient_hooks(self.optimizer._grad_acc_hooks, self.optimizer.create_grad_acc_hooks)

    def resize_group(self, i: int, move: FlatMove) -> int:
        return self.move_states(i, move) + self._rebuild_weights(i, move)

    def _rebuild_weights(self, i: int, move: FlatMove) -> int:
        """Make the new flat buffer of model weights, with the parameters as views of it. Returns bytes sent."""
        optimizer, new = self.optimizer, move.new
        dtype, device = self.weights(i).dtype, self.weights(i).device
        self.release_weights(i)
        optimizer.bf16_partitioned_groups[i] = optimizer.bf16_groups_flat[i] = None
        flat = optimizer.bf16_groups_flat[i] = torch.empty(new.numel, dtype=dtype, device=device)
        optimizer.bf16_partitioned_groups[i] = list(flat.split(new.partition_numel))
        bytes_moved = self.spread_weights(i, optimizer.bf16_partitioned_groups[i])
        self.bind_weights(i, new)
        optimizer.group_paddings[i] = _group_padding(new, self.rank(i))
        return bytes_moved

    def rebuild_maps(self) -> None:
        self._drop_gradients()
        for i in range(len(self.masters())):
            self._rebuild_gradients(i)
        rebuild_fragments(self.optimizer, self.masters())

    def _rebuild_gradients(self, i: int) -> None:
        """Make the gradient buffer and its views as in the constructor of the wrapper."""
        optimizer, layout, flat = self.optimizer, self.layout(i), self.weights(i)
        gradients = torch.zeros_like(flat, dtype=optimizer.grad_acc_dtype)
        views = optimizer._split_flat_tensor(gradients, [param.numel() for param in self.params(i)])
        optimizer.non_expert_gradients.append(gradients)
        optimizer.fp32_groups_gradients_flat[i] = gradients
        optimizer.fp32_groups_gradients[i] = optimizer.fp32_groups_gradient_dict[i] = views
        optimizer.fp32_groups_actual_gradients_flat[i] = gradients[: layout.end]
        start = self.rank(i) * layout.partition_numel
        optimizer.fp32_groups_gradient_flat_partition[i] = gradients[start : start + layout.partition_numel]
        optimizer.fp32_groups_has_gradients[i] = [False] * len(views)

    def weights_from_masters(self) -> None:
        for i, partitions in enumerate(self.optimizer.bf16_partitioned_groups):
            self.spread_weights(i, partitions)
        link_fragments(self.optimizer, self.masters())


def _group_padding(layout: Layout, rank: int) -> int:
    """Padding of the last rank; DeepSpeed counts all padding there, even if it begins on the rank before."""
    return layout.numel - layout.end if rank == layout.num_partitions - 1 else 0
