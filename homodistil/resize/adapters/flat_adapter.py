"""Wrappers that lay parameter groups end to end in flat buffers and cut these into one partition per rank.

What they share: where parameters lie (`Layout`), how masters and optimizer states move (`move_states`), how the weights
that the model computes with follow from the masters (`spread_weights`), and the checks of all that. Subclasses say
under which names their wrapper keeps the buffers, and rebuild what it derives from them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from homodistil.models.resize_plan import DimIndex, ResizePlan, set_param_data
from homodistil.resize.adapters.adapter import Adapter, MasterSlice, StateGroup, select_param
from homodistil.resize.flat import FlatMove, Layout
from homodistil.resize.move import move_partition


class FlatAdapter(Adapter):
    masters_field: ClassVar[str]
    """Attribute of the wrapper: fp32 partition of every group, the key of its state. The tensor objects always stay."""
    weights_field: ClassVar[str]
    """Attribute of the wrapper: flat buffer of the model's weights of every group, all partitions."""
    params_field: ClassVar[str]
    """Attribute of the wrapper: parameters of every group, in the order of its buffer."""

    @abstractmethod
    def layout(self, i: int) -> Layout:
        """How group `i` lies in its buffer, computed from the shapes alone."""

    @abstractmethod
    def alignment(self, i: int) -> tuple[int, int]:
        """Alignment of the buffer and of each parameter, in elements (`Layout.packed`)."""

    @abstractmethod
    def process_group(self, i: int) -> dist.ProcessGroup | None:
        """Ranks that the partitions of group `i` are spread over."""

    @abstractmethod
    def resize_group(self, i: int, move: FlatMove) -> int:
        """Apply `move` to everything of group `i`. Returns bytes sent between ranks, over all ranks."""

    def masters(self) -> list[Tensor]:
        return getattr(self.optimizer, self.masters_field)

    def params(self, i: int) -> list[nn.Parameter]:
        return getattr(self.optimizer, self.params_field)[i]

    def weights(self, i: int) -> Tensor:
        return getattr(self.optimizer, self.weights_field)[i]

    def rank(self, i: int) -> int:
        """Which partition of group `i` is ours."""
        return dist.get_rank(self.process_group(i))

    def torch_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer

    def groups(self) -> list[StateGroup]:
        state = self.torch_optimizer().state
        state_groups = []
        for i, master in enumerate(self.masters()):
            names, layout = [self.name_of[param] for param in self.params(i)], self.layout(i)
            pieces = layout.partition_pieces(self.rank(i))
            held = [MasterSlice(names[piece.parameter], piece.start, piece.position, piece.numel) for piece in pieces]
            replicated = layout.num_partitions < dist.get_world_size()
            state_groups.append(StateGroup(master, state.get(master, {}), held, replicated))
        return state_groups

    def padding(self) -> Iterator[Tensor]:
        for i, group in enumerate(self.groups()):
            unused = list(gaps(group.held, group.master.numel()))
            for tensor in (group.master.detach(), *group.per_element().values()):
                yield from (tensor[start:stop] for start, stop in unused)
            pieces = list(self.layout(i).pieces(0, self.weights(i).numel()))
            yield from (self.weights(i)[start:stop] for start, stop in gaps(pieces, self.weights(i).numel()))

    # -- resizing

    def resize(self, plan: ResizePlan) -> int:
        index_of = self.index_by_parameter(plan)
        self.drop_views()
        bytes_moved = 0
        for i in range(len(self.masters())):
            index = [index_of.get(param, {}) for param in self.params(i)]
            bytes_moved += self.resize_group(i, FlatMove.plan(self.layout(i), index, *self.alignment(i)))
        self.rebuild_maps()
        self._select_unowned(index_of)
        return bytes_moved

    def drop_views(self) -> None:
        """Let go of everything that refers to the old buffers: kept, it would keep all of them allocated."""

    def move_states(self, i: int, move: FlatMove) -> int:
        """Master partition and every state of its shape, one after the other; returns bytes sent, over all ranks."""
        master = self.masters()[i]
        state = self.torch_optimizer().state.get(master, {})
        element_bytes = master.element_size()
        for key in [key for key, value in state.items() if torch.is_tensor(value) and value.shape == master.shape]:
            element_bytes += state[key].element_size()
            # No second name for the old tensor: it must be free before the next state is moved.
            state[key] = self.move_partition(i, state[key], move)
        master.grad = None
        master.data = self.move_partition(i, master.data, move)
        return move.crossing_numel() * element_bytes

    def move_partition(self, i: int, old: Tensor, move: FlatMove) -> Tensor:
        """This rank's new partition of one master or state of group `i`; `old` is freed. Collective."""
        return move_partition(old, move, self.rank(i), self.process_group(i))

    def release_weights(self, i: int) -> None:
        """Parameters let go of the flat buffer that they are views of."""
        for param in self.params(i):
            set_param_data(param, torch.empty(0, dtype=param.dtype, device=param.device))

    def bind_weights(self, i: int, layout: Layout) -> None:
        """Parameters become views of the flat buffer of group `i`, as `layout` says."""
        flat = self.weights(i)
        for param, shape, offset in zip(self.params(i), layout.shapes, layout.offsets, strict=True):
            param.data = flat[offset : offset + math.prod(shape)].view(shape)

    def spread_weights(self, i: int, partitions: list[Tensor]) -> int:
        """Fill the model's flat buffer of group `i`, given as its partitions, from every rank's masters.

        Weights are the rounded masters, before and after every step, so they need not be moved themselves: that would
        take a second buffer. Returns bytes as above.
        """
        group = self.process_group(i)
        partitions[self.rank(i)].copy_(self.masters()[i])
        if len(partitions) == 1:
            return 0
        for owner, partition in enumerate(partitions):  # not all_gather: gloo's needs a second buffer
            dist.broadcast(partition, group=group, group_src=owner)
        return sum(p.nbytes for p in partitions) * (len(partitions) - 1)

    def _select_unowned(self, index_of: dict[nn.Parameter, DimIndex]) -> None:
        """Frozen parameters: whole on every rank, in no group."""
        owned = {param for i in range(len(self.masters())) for param in self.params(i)}
        for param, index in index_of.items():
            if param not in owned:
                select_param(param, index)

    # -- checks

    def weights_follow_masters(self) -> bool:
        """Whether the model's weights are the rounded masters by now."""
        return True

    def check_group(self, i: int, compared: dict[str, tuple[object, object]]) -> None:
        """Raise ValueError for the first of `compared` (field -> actual, expected) that differs, then check content."""
        for field, (value, expected) in compared.items():
            if value != expected:
                raise ValueError(f"{field}[{i}]: {_first_difference(value, expected)}")
        layout, flat, master = self.layout(i), self.weights(i), self.masters()[i]
        for param, offset in zip(self.params(i), layout.offsets, strict=True):
            if param.data_ptr() != flat.data_ptr() + offset * flat.element_size():
                raise ValueError(f"{self.weights_field}[{i}]: a parameter is not a view of it at element {offset}")
        local = flat[self.rank(i) * layout.partition_numel :][: layout.partition_numel]
        rounded = master.detach().to(device=flat.device, dtype=flat.dtype)
        if self.weights_follow_masters() and not torch.equal(local, rounded):
            raise ValueError(f"{self.masters_field}[{i}]: the model's weights are not these, rounded")
        for key, value in self.torch_optimizer().state.get(master, {}).items():
            if torch.is_tensor(value) and value.ndim > 0 and value.shape != master.shape:
                raise ValueError(f"optimizer state {key!r} of group {i}: shape {tuple(value.shape)} is not per element")


def padding_in_partition(layout: Layout, rank: int) -> int:
    """Elements of the partition that lie behind the last parameter."""
    stop = (rank + 1) * layout.partition_numel
    return min(layout.partition_numel, max(0, stop - layout.end))


def gaps(pieces: list, numel: int) -> Iterator[tuple[int, int]]:
    """Stretches of [0, numel) that none of `pieces` (ascending, with `position` and `numel`) covers."""
    end = 0
    for piece in pieces:
        if piece.position > end:
            yield end, piece.position
        end = piece.position + piece.numel
    if end < numel:
        yield end, numel


def _first_difference(actual: object, expected: object) -> str:
    if isinstance(actual, list) and isinstance(expected, list) and len(actual) == len(expected):
        place = next(k for k, pair in enumerate(zip(actual, expected, strict=True)) if pair[0] != pair[1])
        return f"found {actual[place]} at {place}, expected {expected[place]}"
    return f"found {actual}, expected {expected}"
