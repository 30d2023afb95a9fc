"""Base class for wrappers that keep parameter groups end to end in flat buffers, one partition per rank.

It has the layout of parameters (`Layout`), the moving of masters and optimizer states (`move_states`), the update of
the model's weights from the masters (`spread_weights`), and checks. Subclasses define the names of the buffers in their
wrapper, and rebuild what the wrapper derives from them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from homodistil.models.resize_plan import DimIndex, set_param_data
from homodistil.resize.adapters.adapter import Adapter, MasterSlice, StateGroup, select_param
from homodistil.resize.flat import FlatMove, Layout
from homodistil.resize.move import move_partition


def renew_gradient_hooks(hooks: list, create: Callable[[], None]) -> None:
    """Make a wrapper's hooks on gradients again, for they hold parameters or their numbers. Does nothing where it has
    none.

    Args:
        hooks: handles of the wrapper's hooks, emptied here.
        create: the wrapper's own method that fills `hooks`.
    """
    if not hooks:
        return
    for hook in hooks:
        hook.remove()
    hooks.clear()
    create()


class FlatAdapter(Adapter):
    masters_field: ClassVar[str]
    """Attribute of the wrapper: the fp32 partition of each group, the key of its state. The objects always stay."""
    weights_field: ClassVar[str]
    """Attribute of the wrapper: the flat buffer of model weights of each group, with all partitions."""
    params_field: ClassVar[str]
    """Attribute of the wrapper: the parameters of each group, in the order of its buffer."""

    @abstractmethod
    def layout(self, i: int) -> Layout:
        """The layout of group `i` in its buffer, computed from shapes alone."""

    @abstractmethod
    def alignment(self, i: int) -> tuple[int, int]:
        """Alignments of the buffer and of each parameter in elements, for `Layout.packed`."""

    @abstractmethod
    def process_group(self, i: int) -> dist.ProcessGroup | None:
        """The ranks over which group `i` is partitioned."""

    @abstractmethod
    def resize_group(self, i: int, move: FlatMove) -> int:
        """Apply `move` to weights and state of group `i`. Returns the bytes sent between ranks, over all ranks."""

    def masters(self) -> list[Tensor]:
        return getattr(self.optimizer, self.masters_field)

    def params(self, i: int) -> list[nn.Parameter]:
        return getattr(self.optimizer, self.params_field)[i]

    def weights(self, i: int) -> Tensor:
        return getattr(self.optimizer, self.weights_field)[i]

    def group_params(self) -> list[list[nn.Parameter]]:
        return [self.params(i) for i in range(len(self.masters()))]

    def rank(self, i: int) -> int:
        """Index of this rank's partition of group `i`."""
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

    def keep(self, index_of: Mapping[nn.Parameter, DimIndex], leaving: Set[nn.Parameter]) -> int:
        self.drop_views()
        bytes_moved = 0
        for i in range(len(self.masters())):
            index = [index_of.get(param, {}) for param in self.params(i)]
            move = FlatMove.plan(self.layout(i), index, *self.alignment(i))
            if leaving:
                self.forget(i, leaving)
            bytes_moved += self.resize_group(i, move)
        if leaving:
            self.renumber()
        self.rebuild_maps()
        self._select_unowned(index_of)
        return bytes_moved

    def forget(self, i: int, leaving: Set[nn.Parameter]) -> None:
        """Take `leaving` out of the wrapper's lists of the parameters of group `i`; the lists stay the same objects."""
        params = self.params(i)
        _empty([param for param in params if param in leaving])
        params[:] = [param for param in params if param not in leaving]

    def renumber(self) -> None:
        """Mend what the wrapper says of parameters by their number in a group, once some have left. Nothing by
        default."""
        return None

    def drop_views(self) -> None:
        """Drop all references to the old buffers, which would keep them allocated."""

    def move_states(self, i: int, move: FlatMove) -> int:
        """Move the master partition and the states of its shape, one by one. Returns bytes sent by all ranks."""
        master = self.masters()[i]
        state = self.torch_optimizer().state.get(master, {})
        element_bytes = master.element_size()
        for key in [key for key, value in state.items() if torch.is_tensor(value) and value.shape == master.shape]:
            element_bytes += state[key].element_size()
            # No second reference to the old tensor, so that it is freed before the next state is moved.
            state[key] = self.move_partition(i, state[key], move)
        master.grad = None
        master.data = self.move_partition(i, master.data, move)
        return move.crossing_numel() * element_bytes

    def move_partition(self, i: int, old: Tensor, move: FlatMove) -> Tensor:
        """The new partition of this rank of one master or state of group `i`; frees `old`. Collective."""
        return move_partition(old, move, self.rank(i), self.process_group(i))

    def release_weights(self, i: int) -> None:
        """Replace the data of the parameters, which are views of the flat buffer, by empty tensors."""
        _empty(self.params(i))

    def bind_weights(self, i: int, layout: Layout) -> None:
        """Make the parameters views of the flat buffer of group `i`, according to `layout`."""
        flat = self.weights(i)
        for param, shape, offset in zip(self.params(i), layout.shapes, layout.offsets, strict=True):
            param.data = flat[offset : offset + math.prod(shape)].view(shape)

    def spread_weights(self, i: int, partitions: list[Tensor]) -> int:
        """Fill the flat buffer of model weights of group `i`, given as its partitions, from the masters of all ranks.

        Between steps the weights are the rounded masters. They are therefore not moved, which would need a second
        buffer. Returns the bytes sent between ranks, over all ranks.
        """
        group = self.process_group(i)
        partitions[self.rank(i)].copy_(self.masters()[i])
        if len(partitions) == 1:
            return 0
        for owner, partition in enumerate(partitions):  # not all_gather, which needs a second buffer with gloo
            dist.broadcast(partition, group=group, group_src=owner)
        return sum(p.nbytes for p in partitions) * (len(partitions) - 1)

    def _select_unowned(self, index_of: Mapping[nn.Parameter, DimIndex]) -> None:
        """Slice frozen parameters, which are in no group, and whole on every rank."""
        owned = {param for i in range(len(self.masters())) for param in self.params(i)}
        for param, index in index_of.items():
            if param not in owned:
                select_param(param, index)

    # -- checks

    def weights_follow_masters(self) -> bool:
        """Whether the model's weights must already be the rounded masters."""
        return True

    def check_group(self, i: int, compared: dict[str, tuple[object, object]]) -> None:
        """Raise ValueError for the first difference in `compared` (field -> actual, expected) or in the content."""
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


def _empty(params: Iterable[nn.Parameter]) -> None:
    for param in params:
        set_param_data(param, torch.empty(0, dtype=param.dtype, device=param.device))


def padding_in_partition(layout: Layout, rank: int) -> int:
    """Number of elements in the partition of `rank` after the last parameter."""
    stop = (rank + 1) * layout.partition_numel
    return min(layout.partition_numel, max(0, stop - layout.end))


def gaps(pieces: list, numel: int) -> Iterator[tuple[int, int]]:
    """Ranges of [0, numel) that are not covered by `pieces` (ascending, with `position` and `numel`)."""
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
