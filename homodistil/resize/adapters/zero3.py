"""ZeRO stage 3: DeepSpeedZeroOptimizer_Stage3, fp32, bf16 or fp16 (DeepSpeed 0.19, runtime/zero/stage3.py).

Every parameter, also a frozen one, is partitioned separately: each rank keeps an equal share of it (`ds_tensor`, padded
to a multiple of the number of ranks) and gathers the rest for every use. The shares of a sub-group lie end to end in a
flat buffer, and masters and states have the same layout. In fp32 without offload, the master is this buffer (the same
tensor object). With offload, masters, states and reduced gradients are in host memory.

The trace of modules in DeepSpeed's parameter coordinator has no sizes, so it stays valid after an event, unless modules
have left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set

import torch
import torch.distributed as dist
from torch import Tensor, nn

from homodistil.models.parameter_shape import full_numel, full_shape
from homodistil.models.resize_plan import DimIndex, set_param_data
from homodistil.resize.adapters.adapter import Adapter, MasterSlice, StateGroup
from homodistil.resize.adapters.flat_adapter import gaps
from homodistil.resize.adapters.zero3_check import GRADIENT_OF_ID, check_books
from homodistil.resize.flat import FlatMove, Layout
from homodistil.resize.move import free
from homodistil.resize.move_partitions import move_partitions

Moves = dict[nn.Parameter, FlatMove]


class Zero3Adapter(Adapter):
    fields = {
        "optimizer": torch.optim.Optimizer,
        "parameter_offload": object,
        "persistent_parameters": list,
        "fp16_groups": list,
        "fp16_partitioned_groups": list,
        "fp16_partitioned_groups_flat": list,
        "fp16_partitioned_groups_flat_numel": list,
        "fp32_partitioned_groups_flat": list,
        "lp_param_buffer": Tensor,
        "fp16_partitioned_groups_flat_id": list,
        "groups_padding": list,
        "grad_partitions_flat_buffer": Tensor,
        GRADIENT_OF_ID: dict,
        "grad_position": dict,
        "averaged_gradients": dict,
        "param_dict": dict,
        "params_already_reduced": dict,
        "ipg_buckets": dict,
        "gradient_accumulation_dtype": torch.dtype,
        "offload_optimizer": bool,
        "offload_optimizer_pin_memory": bool,
        "_offload_boundary_param_ids": set,
    }

    def __init__(self, engine):
        super().__init__(engine)
        self.process_group = self.optimizer.dp_process_group
        self.rank, self.num_ranks = dist.get_rank(self.process_group), dist.get_world_size(self.process_group)
        self.device = next(iter(self.parameters.values())).device

    def torch_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer

    def masters(self) -> list[Tensor]:
        return self.optimizer.fp32_partitioned_groups_flat

    def params(self, i: int) -> list[nn.Parameter]:
        return self.optimizer.fp16_groups[i]

    def group_params(self) -> list[list[nn.Parameter]]:
        return self.optimizer.fp16_groups

    def masters_are_weights(self) -> bool:
        """Whether masters and model weights are the same tensors, as in fp32 without offload."""
        flats = self.optimizer.fp16_partitioned_groups_flat
        return all(master is flat for master, flat in zip(self.masters(), flats, strict=True))

    def layout(self, param: nn.Parameter) -> Layout:
        """The layout of `param` over the ranks, computed from its shape alone."""
        return Layout.packed([full_shape(param)], self.num_ranks, self.num_ranks)

    # -- weights and state

    def groups(self) -> list[StateGroup]:
        state = self.torch_optimizer().state
        return [
            StateGroup(master, state.get(master, {}), self.held(self.params(i)), replicated=False)
            for i, master in enumerate(self.masters())
        ]

    def frozen_groups(self) -> list[StateGroup]:
        return [StateGroup(param.ds_tensor, {}, self.held([param]), replicated=False) for param in self.frozen()]

    def frozen(self) -> list[nn.Parameter]:
        trained = {param for params in self.optimizer.fp16_groups for param in params}
        return [param for param in self.parameters.values() if param not in trained]

    def held(self, params: list[nn.Parameter]) -> list[MasterSlice]:
        """The slices in this rank's shares of `params`, which lie end to end."""
        slices, position = [], 0
        for param in params:
            layout = self.layout(param)
            for piece in layout.partition_pieces(self.rank):
                slices.append(MasterSlice(self.name_of[param], piece.start, position + piece.position, piece.numel))
            position += layout.partition_numel
        return slices

    def padding(self) -> Iterator[Tensor]:
        flats = self.optimizer.fp16_partitioned_groups_flat
        for group, flat in zip(self.groups(), flats, strict=True):
            for tensor in (group.master.detach(), flat.detach(), *group.per_element().values()):
                yield from (tensor[start:stop] for start, stop in gaps(group.held, tensor.numel()))
        for group in self.frozen_groups():
            yield from (group.master[start:stop] for start, stop in gaps(group.held, group.master.numel()))

    def gradients(self, i: int) -> Callable[[MasterSlice], Tensor]:
        gradient_of_id = getattr(self.optimizer, GRADIENT_OF_ID)
        return lambda held: gradient_of_id[self.parameters[held.name].ds_id][: held.numel]

    def has_pending_gradients(self) -> bool:
        # The gradient buffer stays allocated, so it shows nothing. DeepSpeed's set of parameters that were reduced
        # since the last step does.
        optimizer = self.optimizer
        in_buckets = any(bucket.params for bucket in optimizer.ipg_buckets.values())
        in_parameters = any(param.grad is not None for param in self.parameters.values())
        return bool(optimizer._offload_boundary_param_ids) or in_buckets or in_parameters

    # -- resizing

    def keep(self, index_of: Mapping[nn.Parameter, DimIndex], leaving: Set[nn.Parameter]) -> int:
        self._release_parameters()
        moves = {
            param: FlatMove.plan(self.layout(param), [index_of.get(param, {})], self.num_ranks)
            for param in self.parameters.values()
        }
        self._drop_gradients()
        bytes_moved = self._move_masters(moves) + self._move_states(moves) + self._move_frozen(moves)
        if leaving:
            self._forget(leaving)
        for param, move in moves.items():
            if param not in leaving:
                _describe(param, move)
        for i, params in enumerate(self.optimizer.fp16_groups):
            self.optimizer.fp16_partitioned_groups_flat_numel[i] = self.masters()[i].numel()
            self.optimizer.groups_padding[i] = [self.padding_size(param) for param in params]
        self._rebuild_gradients()
        return bytes_moved + self._gather_persistent()

    def _forget(self, leaving: Set[nn.Parameter]) -> None:
        """Take `leaving`, which are empty now, out of DeepSpeed's lists and tables; its trace of modules is void."""
        optimizer = self.optimizer
        for params, shares in zip(optimizer.fp16_groups, optimizer.fp16_partitioned_groups, strict=True):
            params[:] = [param for param in params if param not in leaving]
            shares[:] = [param.ds_tensor for param in params]
        optimizer.fp16_partitioned_groups_flat_id[:] = [[p.ds_id for p in params] for params in optimizer.fp16_groups]
        persistent = optimizer.persistent_parameters
        persistent[:] = [param for param in persistent if param not in leaving]
        for param in leaving:
            for table in (optimizer.grad_position, optimizer.param_dict, optimizer.params_already_reduced):
                table.pop(optimizer.get_param_id(param), None)
            param.ds_tensor.data = param.ds_tensor.new_empty(0)  # no view that would keep the buffer allocated
        coordinator = optimizer.parameter_offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()

    def _release_parameters(self) -> None:
        """Release all gathered parameters, also small ones that usually stay gathered, and wait for pending gathers."""
        self.optimizer.parameter_offload.partition_all_parameters()

    def _gather_persistent(self) -> int:
        """Gather the parameters below DeepSpeed's threshold, which stay gathered between steps. Returns bytes sent by
        all ranks."""
        params = self.optimizer.persistent_parameters
        if not params:
            return 0
        params[0].all_gather(params)
        return sum(full_numel(param) * param.element_size() for param in params) * (self.num_ranks - 1)

    def _drop_gradients(self) -> None:
        optimizer = self.optimizer
        optimizer.grad_partitions_flat_buffer = None
        getattr(optimizer, GRADIENT_OF_ID).clear()
        optimizer.averaged_gradients.clear()
        for master in self.masters():
            master.grad = None

    def _move_masters(self, moves: Moves) -> int:
        """Move the masters and the model's weights. Returns bytes sent by all ranks."""
        shared = self.masters_are_weights()
        targets = self._allocate_weights(moves) if shared else self._drop_weights()
        bytes_moved = 0
        for i, target in enumerate(targets):
            master, group_moves = self.masters()[i], [moves[param] for param in self.params(i)]
            if target is None:
                target = torch.zeros(_numel_after(group_moves), dtype=master.dtype, device=master.device)
            bytes_moved += self._move(master.detach(), target, group_moves)
            old, master.data = master.detach(), target
            if shared:
                self._bind(i, target, group_moves)
            free(old)
        if not shared:
            # The weights are not moved, because they are the rounded masters between steps.
            for i, weights in enumerate(self._allocate_weights(moves)):
                weights.copy_(self.masters()[i])
                self.optimizer.fp16_partitioned_groups_flat[i] = weights
                self._bind(i, weights, [moves[param] for param in self.params(i)])
        return bytes_moved

    def _drop_weights(self) -> list[None]:
        """Free the shares of the model's weights, if the masters are separate tensors."""
        optimizer = self.optimizer
        for param in (param for params in optimizer.fp16_groups for param in params):
            param.ds_tensor.data = param.ds_tensor.new_empty(0)
        optimizer.lp_param_buffer = None
        optimizer.fp16_partitioned_groups_flat[:] = [None] * len(self.masters())
        return [None] * len(self.masters())

    def _allocate_weights(self, moves: Moves) -> list[Tensor]:
        """Make one new buffer for the shares of all groups, as DeepSpeed does. Returns the part of each group."""
        sizes = [_numel_after([moves[param] for param in params]) for params in self.optimizer.fp16_groups]
        share = self.params(0)[0].ds_tensor
        self.optimizer.lp_param_buffer = torch.zeros(sum(sizes), dtype=share.dtype, device=share.device)
        return list(self.optimizer.lp_param_buffer.split(sizes))

    def _bind(self, i: int, flat: Tensor, moves: list[FlatMove]) -> None:
        """Make the shares of group `i` views of its part of the buffer."""
        views = flat.detach().split([move.new.partition_numel for move in moves])
        for param, view in zip(self.params(i), views, strict=True):
            param.ds_tensor.data = view

    def _move_states(self, moves: Moves) -> int:
        bytes_moved = 0
        for i, group in enumerate(self.groups()):
            group_moves = [moves[param] for param in self.params(i)]
            for key, value in group.state.items():
                # Not `per_element`, because the masters already have their new length.
                if torch.is_tensor(value) and value.ndim == 1 and value.numel() == _numel_before(group_moves):
                    group.state[key] = torch.zeros(_numel_after(group_moves), dtype=value.dtype, device=value.device)
                    bytes_moved += self._move(value, group.state[key], group_moves)
                    free(value)
        return bytes_moved

    def _move_frozen(self, moves: Moves) -> int:
        bytes_moved = 0
        for param in self.frozen():
            old, move = param.ds_tensor.detach(), moves[param]
            param.ds_tensor.data = old.new_zeros(move.new.partition_numel)
            bytes_moved += self._move(old, param.ds_tensor.detach(), [move])
        return bytes_moved

    def _move(self, old: Tensor, new: Tensor, moves: list[FlatMove]) -> int:
        olds = old.split([move.old.partition_numel for move in moves])
        news = new.split([move.new.partition_numel for move in moves])
        move_partitions(olds, news, moves, self.rank, self.process_group, self.device)
        return sum(move.crossing_numel() for move in moves) * old.element_size()

    def _rebuild_gradients(self) -> None:
        """Make buffers and maps of reduced gradients as in the constructor of the wrapper."""
        optimizer = self.optimizer
        params = [param for group in optimizer.fp16_groups for param in group]
        sizes = [param.ds_tensor.ds_numel for param in params]
        dtype = optimizer.gradient_accumulation_dtype
        flat = self._pin(torch.zeros(sum(sizes), dtype=dtype, device=optimizer.device))
        optimizer.grad_partitions_flat_buffer = flat
        gradient_of_id = getattr(optimizer, GRADIENT_OF_ID)
        gradient_of_id.update(zip((param.ds_id for param in params), flat.split(sizes), strict=True))
        optimizer.set_grad_positions()
        if optimizer.offload_optimizer:
            for master in self.masters():
                master.grad = self._pin(torch.zeros_like(master, requires_grad=False))

    def padding_size(self, param: nn.Parameter) -> int:
        """Padding of `param` as DeepSpeed records it: all of it on the last rank."""
        return -full_numel(param) % self.num_ranks if self.rank == self.num_ranks - 1 else 0

    def weights_from_masters(self) -> None:
        self._release_parameters()
        if not self.masters_are_weights():
            for flat, master in zip(self.optimizer.fp16_partitioned_groups_flat, self.masters(), strict=True):
                flat.copy_(master)
        self._gather_persistent()

    def check_layout(self) -> None:
        check_books(self)

    def _pin(self, tensor: Tensor) -> Tensor:
        return _accelerator().pin_memory(tensor) if self.optimizer.offload_optimizer_pin_memory else tensor


def _describe(param: nn.Parameter, move: FlatMove) -> None:
    """Update the sizes that DeepSpeed keeps on a parameter; its data is empty until it is gathered."""
    (shape,) = move.new.shapes
    param.ds_shape, param.ds_numel = torch.Size(shape), move.new.end
    param.ds_numel_aligned, param.ds_tensor.ds_numel = move.new.numel, move.new.partition_numel
    set_param_data(param, torch.empty(0, dtype=param.dtype, device=param.device))


def _numel_before(moves: list[FlatMove]) -> int:
    return sum(move.old.partition_numel for move in moves)


def _numel_after(moves: list[FlatMove]) -> int:
    return sum(move.new.partition_numel for move in moves)


def _accelerator():
    from deepspeed.accelerator import get_accelerator  # slow to import, but loaded already

    return get_accelerator()
