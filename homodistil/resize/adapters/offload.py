"""ZeRO stages 1 and 2 with the optimizer offloaded to the CPU: DeepSpeedZeroOptimizer with `cpu_offload`.

Masters and states are in host memory (masters and staging buffers in pinned memory, if configured), and the model's
weights on the accelerator. At a boundary each rank copies its share of the reduced gradients to the `.grad` of its
master partition, which stays allocated, and keeps tables of the positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from homodistil.resize.adapters.adapter import MasterSlice
from homodistil.resize.adapters.zero import ZeroAdapter
from homodistil.resize.flat import FlatMove
from homodistil.resize.move import free, spread
from homodistil.resize.move_partitions import move_partitions


class OffloadAdapter(ZeroAdapter):
    fields = ZeroAdapter.fields | {
        "cpu_offload": bool,
        "cpu_offload_pin_memory": bool,
        "micro_step_id": int,
        "param_buffer_of_bit16_for_cpu_offload_groups": list,
        "grad_position": dict,
        "accumulated_grads_in_cpu": dict,
        "norm_for_param_grads": dict,
        "offload_gradient_dict": dict,
        "temp_grad_buffer_for_cpu_offload": Tensor,
        "temp_grad_buffer_for_gpu_offload": Tensor,
    }

    def check_layout(self) -> None:
        super().check_layout()
        for i, master in enumerate(self.masters()):
            size = self.optimizer.partition_size[i]
            for field, tensor in {
                "single_partition_of_fp32_groups.grad": master.grad,
                "param_buffer_of_bit16_for_cpu_offload_groups": self._bit16_buffers()[i],
            }.items():
                if tensor is None or tuple(tensor.shape) != (size,):
                    actual = "nothing" if tensor is None else tuple(tensor.shape)
                    raise ValueError(f"{field}[{i}]: found {actual}, expected shape {(size,)}")
            self._check_positions(i)

    def _check_positions(self, i: int) -> None:
        layout, optimizer = self.layout(i), self.optimizer
        for piece in layout.partition_pieces(self.rank(i)):
            param = self.params(i)[piece.parameter]
            actual = optimizer.grad_position.get(optimizer.get_param_id(param))
            expected = [i, piece.start, piece.position, piece.numel]
            if actual != expected:
                raise ValueError(f"grad_position of {self.name_of[param]}: found {actual}, expected {expected}")

    def _bit16_buffers(self) -> list[Tensor]:
        return self.optimizer.param_buffer_of_bit16_for_cpu_offload_groups

    def has_pending_gradients(self) -> bool:
        # The gradient buffers stay allocated, so they show nothing. backward counts up from -1, and step resets to -1.
        return self.optimizer.micro_step_id >= 0 or super().has_pending_gradients()

    def gradients(self, i: int) -> Callable[[MasterSlice], Tensor]:
        self.optimizer._wait_for_offload_copies()
        gradient = self.masters()[i].grad
        return lambda held: gradient[held.position : held.position + held.numel]

    def drop_views(self) -> None:
        """Drop fragments and tables of gradients, which have views of `.grad` and host buffers of parameter size."""
        super().drop_views()
        optimizer = self.optimizer
        optimizer._wait_for_offload_copies()
        for table in (
            optimizer.accumulated_grads_in_cpu,
            optimizer.norm_for_param_grads,
            optimizer.offload_gradient_dict,
            optimizer.grad_position,
        ):
            table.clear()

    def resize_group(self, i: int, move: FlatMove) -> int:
        self._bit16_buffers()[i] = None
        return super().resize_group(i, move)

    def move_states(self, i: int, move: FlatMove) -> int:
        bytes_moved = super().move_states(i, move)
        master = self.masters()[i]
        master.data = self._pin(master.data)
        return bytes_moved

    def move_partition(self, i: int, old: Tensor, move: FlatMove) -> Tensor:
        return move_host_partition(old, move, self.rank(i), self.process_group(i), self.weights(i).device)

    def rebuild_maps(self) -> None:
        optimizer = self.optimizer
        for i, master in enumerate(self.masters()):
            master.grad = self._pin(torch.zeros_like(master, requires_grad=False))
            buffer = torch.zeros_like(master, dtype=self.weights(i).dtype, requires_grad=False)
            self._bit16_buffers()[i] = self._pin(buffer)
            optimizer.get_grad_position(
                i, optimizer.params_in_partition[i], optimizer.first_offset[i], optimizer.partition_size[i]
            )
        self._rebuild_staging()
        super().rebuild_maps()
        optimizer._create_optimizer_mapping()

    def _rebuild_staging(self) -> None:
        """Make new buffers for one gradient, with the new size of the largest parameter."""
        optimizer = self.optimizer
        numel = max(param.numel() for group in optimizer.bit16_groups for param in group)
        optimizer.temp_grad_buffer_for_cpu_offload = self._pin(torch.zeros(numel, dtype=optimizer.dtype))
        on_device = optimizer.temp_grad_buffer_for_gpu_offload
        optimizer.temp_grad_buffer_for_gpu_offload = torch.zeros(numel, dtype=optimizer.dtype, device=on_device.device)

    def _pin(self, tensor: Tensor) -> Tensor:
        """Pin `tensor` if configured. torch's pinned memory is freed with its tensor; `support` refuses DeepSpeed's."""
        return _accelerator().pin_memory(tensor) if self.optimizer.cpu_offload_pin_memory else tensor


def move_host_partition(
    old: Tensor, move: FlatMove, rank: int, group: dist.ProcessGroup | None, device: torch.device
) -> Tensor:
    """`move.move_partition` for a partition in host memory, if ranks can communicate only between accelerators (NCCL).

    Only elements that change rank are copied to `device`, in rounds that need little memory there. An additional gloo
    group would be slower, and would need a network interface to be configured.
    """
    numel, has_gaps = move.due[rank + 1] - move.due[rank], any(move.new.padding())
    new = torch.zeros(move.new.partition_numel, dtype=old.dtype)
    landing = torch.zeros(numel, dtype=old.dtype) if has_gaps else new[:numel]
    move_partitions([old], [landing], [move], rank, group, device)
    free(old)
    if has_gaps:
        spread(landing, new, rank * move.new.partition_numel, move)
    return new


def _accelerator():
    from deepspeed.accelerator import get_accelerator  # slow to import, but loaded already

    return get_accelerator()
