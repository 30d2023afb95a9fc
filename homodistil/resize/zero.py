"""ZeRO stages 1 and 2: DeepSpeedZeroOptimizer, fp32 or bf16 (DeepSpeed 0.19, runtime/zero/stage_1_and_2.py).

Each parameter group is one flat buffer of model weights, replicated, and one partition a rank of the fp32 masters and
of every optimizer state. The tensor object of the master partition is the key of `optimizer.state` and stands in
`param_groups`: it stays, only its data changes. Everything DeepSpeed derives from shapes is derived again, by its own
methods where it has one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from homodistil.resize.adapter import Adapter, Fragment, select_param
from homodistil.resize.flat import FlatMove, Layout
from homodistil.resize.move import move_partition, set_param_data
from homodistil.resize.plan import DimIndex, ResizePlan

PARAMETER_ALIGNMENT_BYTES = 16
"""What DeepSpeed's `parameter_alignment` aligns each parameter to."""


class ZeroAdapter(Adapter):
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
    }

    def num_groups(self) -> int:
        return len(self.optimizer.bit16_groups)

    def layout(self, i: int) -> Layout:
        """How group `i` lies in its flat buffer, from the shapes alone."""
        shapes = [tuple(meta.shape) for meta in self.optimizer.round_robin_bit16_meta[i]]
        return Layout.packed(shapes, dist.get_world_size(self.optimizer.real_dp_process_group[i]), *self._alignment(i))

    def _alignment(self, i: int) -> tuple[int, int]:
        """Alignment of the buffer and of each parameter, in elements (`Layout.packed`)."""
        optimizer = self.optimizer
        element_bytes = optimizer.bit16_groups_flat[i].element_size()
        of_parameter = PARAMETER_ALIGNMENT_BYTES // math.gcd(PARAMETER_ALIGNMENT_BYTES, element_bytes)
        num_ranks = dist.get_world_size(optimizer.real_dp_process_group[i])
        return optimizer.nccl_start_alignment_factor * num_ranks, of_parameter if optimizer.parameter_alignment else 1

    def check_layout(self) -> None:
        for i in range(self.num_groups()):
            self._check_group(i)

    def _check_group(self, i: int) -> None:
        optimizer, layout = self.optimizer, self.layout(i)
        flat, master = optimizer.bit16_groups_flat[i], optimizer.single_partition_of_fp32_groups[i]
        rank = dist.get_rank(optimizer.real_dp_process_group[i])
        found_and_expected = {
            "round_robin_bit16_offsets": (list(optimizer.round_robin_bit16_offsets[i]), list(layout.offsets)),
            "round_robin_bit16_padding": (list(optimizer.round_robin_bit16_padding[i]), list(layout.padding())),
            "bit16_groups_flat": (flat.numel(), layout.numel),
            "partition_size": (optimizer.partition_size[i], layout.partition_numel),
            "single_partition_of_fp32_groups": (tuple(master.shape), (layout.partition_numel,)),
            "groups_padding": (optimizer.groups_padding[i], _padding_in_partition(layout, rank)),
        }
        for field, (found, expected) in found_and_expected.items():
            if found != expected:
                raise ValueError(f"{field}[{i}]: {_first_difference(found, expected)}")
        for param, offset in zip(optimizer.round_robin_bit16_groups[i], layout.offsets, strict=True):
            if param.data_ptr() != flat.data_ptr() + offset * flat.element_size():
                raise ValueError(f"bit16_groups_flat[{i}]: a parameter is not a view of it at element {offset}")
        if not torch.equal(optimizer.parallel_partitioned_bit16_groups[i][rank], master.detach().to(flat.dtype)):
            raise ValueError(f"single_partition_of_fp32_groups[{i}]: the model's weights are not these, rounded")
        for key, value in optimizer.optimizer.state.get(master, {}).items():
            if torch.is_tensor(value) and value.ndim > 0 and value.shape != master.shape:
                raise ValueError(f"optimizer state {key!r} of group {i}: shape {tuple(value.shape)} is not per element")

    def has_pending_gradients(self) -> bool:
        waiting = [*self.optimizer.averaged_gradients.values(), *self.optimizer.all_grad_tensors.values()]
        return any(entry is not None for entry in [*waiting, *(param.grad for param in self.parameters.values())])

    def resize(self, plan: ResizePlan) -> int:
        index_of = self.index_by_parameter(plan)
        self._drop_views()
        bytes_moved = 0
        for i in range(self.num_groups()):
            index = [index_of.get(param, {}) for param in self.optimizer.round_robin_bit16_groups[i]]
            move = FlatMove.plan(self.layout(i), index, *self._alignment(i))
            bytes_moved += self._move_states(i, move) + self._rebuild_weights(i, move)
            self._rebuild_partition_info(i, move)
        self._rebuild_maps()
        self._select_unowned(index_of)
        return bytes_moved

    def _drop_views(self) -> None:
        """Fragments are views of the old weights, masters and moments: kept, they would keep all of them allocated."""
        for param in (param for group in self.optimizer.bit16_groups for param in group):
            param._hp_mapping = None

    def _move_states(self, i: int, move: FlatMove) -> int:
        """Master partition and every state of its shape, one after the other; returns bytes sent, over all ranks."""
        optimizer, group = self.optimizer, self.optimizer.real_dp_process_group[i]
        rank, master = dist.get_rank(group), self.optimizer.single_partition_of_fp32_groups[i]
        state = optimizer.optimizer.state.get(master, {})
        element_bytes = master.element_size()
        for key in [key for key, value in state.items() if torch.is_tensor(value) and value.shape == master.shape]:
            element_bytes += state[key].element_size()
            # No second name for the old tensor: it must be free before the next state is moved.
            state[key] = move_partition(state[key], move, rank, group)
        master.grad = None
        master.data = move_partition(master.data, move, rank, group)
        return move.crossing_numel() * element_bytes

    def _rebuild_weights(self, i: int, move: FlatMove) -> int:
        """The flat buffer that the model computes with, and the parameters as views of it; returns bytes as above.

        Its content is the masters in the model's precision, before and after every step, so it is spread from them
        anew, as a step does it. The old one is freed first: moving it would need a second one beside it.
        """
        optimizer, group = self.optimizer, self.optimizer.real_dp_process_group[i]
        for param in optimizer.bit16_groups[i]:
            param.grad_accum = None
            set_param_data(param, torch.empty(0, dtype=param.dtype, device=param.device))
        dtype, device = optimizer.bit16_groups_flat[i].dtype, optimizer.bit16_groups_flat[i].device
        optimizer.parallel_partitioned_bit16_groups[i] = optimizer.bit16_groups_flat[i] = None
        flat = torch.empty(move.new.numel, dtype=dtype, device=device)
        optimizer.bit16_groups_flat[i] = flat
        optimizer.parallel_partitioned_bit16_groups[i] = optimizer.get_data_parallel_partitions(flat, i)
        partitions = optimizer.parallel_partitioned_bit16_groups[i]
        partitions[dist.get_rank(group)].copy_(optimizer.single_partition_of_fp32_groups[i])
        for owner, partition in enumerate(partitions):  # not all_gather: gloo's needs a second buffer
            dist.broadcast(partition, group=group, group_src=owner)
        optimizer.round_robin_bit16_meta[i] = [
            torch.empty(shape, dtype=dtype, device="meta") for shape in move.new.shapes
        ]
        optimizer.round_robin_bit16_padding[i] = list(move.new.padding())
        optimizer.round_robin_bit16_offsets[i] = list(move.new.offsets)
        optimizer._update_model_bit16_weights(i)
        return flat.nbytes * (len(partitions) - 1)

    def _rebuild_partition_info(self, i: int, move: FlatMove) -> None:
        """Partition bookkeeping of one group, as the wrapper's constructor does it."""
        optimizer = self.optimizer
        rank, size = dist.get_rank(optimizer.real_dp_process_group[i]), move.new.partition_numel
        optimizer.groups_padding[i] = _padding_in_partition(move.new, rank)
        optimizer.partition_size[i] = size
        inside, outside, first_offset = optimizer.get_partition_info(
            optimizer.round_robin_bit16_groups[i], size, rank, optimizer.round_robin_bit16_padding[i]
        )
        optimizer.params_in_partition[i], optimizer.params_not_in_partition[i] = inside, outside
        optimizer.first_offset[i] = first_offset

    def _rebuild_maps(self) -> None:
        """What DeepSpeed derives from all groups together, in the order of its constructor."""
        optimizer = self.optimizer
        for is_inside, groups in ((True, optimizer.params_in_partition), (False, optimizer.params_not_in_partition)):
            for param in (param for group in groups for param in group):
                optimizer.is_param_in_current_partition[optimizer.get_param_id(param)] = is_inside
        optimizer._release_ipg_buffers()
        optimizer.extra_large_param_to_reduce.clear()
        optimizer.averaged_gradients.clear()  # the same dict: fragments refer to it
        optimizer.all_grad_tensors.clear()
        optimizer.initialize_gradient_partitioning_data_structures()
        optimizer.reset_partition_gradient_structures()
        optimizer._link_all_hp_params()
        optimizer._hp_optimizer_states_linked = False
        # Not yet when a group has no state, i.e. before the first step: DeepSpeed links after that step by itself.
        if all(optimizer.optimizer.state.get(master) for master in optimizer.single_partition_of_fp32_groups):
            optimizer._lazy_init_hp_params_optimizer_state()
        optimizer._param_slice_mappings = optimizer._create_param_mapping()

    def _select_unowned(self, index_of: dict[nn.Parameter, DimIndex]) -> None:
        """Frozen parameters: whole on every rank, in no group."""
        owned = {param for group in self.optimizer.bit16_groups for param in group}
        for param, index in index_of.items():
            if param not in owned:
                select_param(param, index)

    def gradient_fragments(self) -> Iterator[Fragment]:
        optimizer, name_of = self.optimizer, {param: name for name, param in self.parameters.items()}
        for i, params in enumerate(optimizer.round_robin_bit16_groups):
            averaged = optimizer.averaged_gradients.get(i)
            assert averaged is not None, "gradients exist only between engine.backward at the boundary and engine.step"
            gradient_at, position = {}, 0
            for gradient in averaged:  # fragments and padding, in the order of the partition
                gradient_at[position] = gradient
                position += gradient.numel()
            master = optimizer.single_partition_of_fp32_groups[i].detach()
            for piece in self.layout(i).partition_pieces(dist.get_rank(optimizer.real_dp_process_group[i])):
                gradient = gradient_at[piece.position].flatten().float()
                assert gradient.numel() == piece.numel, "averaged_gradients does not follow the layout"
                weight = master[piece.position : piece.position + piece.numel].float()
                yield Fragment(name_of[params[piece.parameter]], piece.start, weight, gradient)

    def master_weights(self) -> dict[str, Tensor]:
        gathered = {}
        for i, params in enumerate(self.optimizer.round_robin_bit16_groups):
            full = self._gather_flat(i)
            for param, shape, offset in zip(params, self.layout(i).shapes, self.layout(i).offsets, strict=True):
                gathered[param] = full[offset : offset + math.prod(shape)].view(shape)
        # A frozen parameter has no master: its own value is all there is.
        return {n: gathered[p] if p in gathered else p.detach().float().clone() for n, p in self.parameters.items()}

    def _gather_flat(self, i: int) -> Tensor:
        """The whole flat buffer of fp32 masters of group `i`, on every rank.

        Not DeepSpeed's safe_get_full_*: those are wrong under `round_robin_gradients` (0.19.8).
        """
        group = self.optimizer.real_dp_process_group[i]
        partition = self.optimizer.single_partition_of_fp32_groups[i].detach()
        num_ranks = dist.get_world_size(group)
        full = torch.empty(num_ranks * partition.numel(), dtype=partition.dtype, device=partition.device)
        dist.all_gather(list(full.chunk(num_ranks)), partition, group=group)
        return full


def _padding_in_partition(layout: Layout, rank: int) -> int:
    """Elements of the partition that lie behind the last parameter."""
    stop = (rank + 1) * layout.partition_numel
    return min(layout.partition_numel, max(0, stop - layout.end))


def _first_difference(found: object, expected: object) -> str:
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        place = next(k for k, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
        return f"found {found[place]} at {place}, expected {expected[place]}"
    return f"found {found}, expected {expected}"
