"""What a resize event does to every parameter: kept indices or linear maps of axes -> those of parameter dimensions.

pruning/selection decides the keep, pruning/compensation the maps; `make_plan` translates them once, from the same axis
table that importance and export read; `resize()` and `slice_module()` apply the plan. Nothing here knows of ranks,
optimizers or DeepSpeed.

A dimension is either selected from (`index`) or contracted with a matrix (`maps`), of which a selection is the simple
case. On a live engine a map is a change of values at the old widths that leaves the result in the leading entries,
followed by the selection of these (`as_selection`), so nothing below the plan (layouts, moves, adapters) knows of maps.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from homodistil.models.axes import AxisTable, AxisUse, Keep, outer_axes, widths_after
from homodistil.models.parameter_shape import full_shape

DimIndex = Mapping[int, Tensor]
"""Dimension of a parameter -> int64 indices that stay, ascending, shape (k,); an absent dimension stays whole."""

DimMaps = Mapping[int, Tensor]
"""Dimension of a parameter -> matrix M (old length, new length) that contracts it: new_j = sum_i old_i M_ij."""


@dataclass(frozen=True)
class ResizePlan:
    """One resize event, the same on every rank. Indices and maps live on the CPU."""

    keep: Keep
    """What was asked for, by axis."""
    index: dict[str, dict[int, Tensor]]
    """Parameter name -> dimension -> indices that stay. Only dimensions that lose something."""
    sizes: dict[str, dict[int, int]]
    """Parameter name -> dimension -> its length before the event, for exactly the entries of `index` and `maps`."""
    widths_before: dict[str, int]
    widths_after: dict[str, int]
    hash: str
    """sha256 (hex) over names, dimensions, lengths, indices and maps: equal hashes, equal events."""
    maps: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    """Parameter name -> dimension -> its map, fp32 or fp64. A dimension has an index or a map, not both."""

    def as_selection(self) -> ResizePlan:
        """The event for values that a map has already brought into the leading entries of each mapped dim."""
        index = {name: dict(dims) for name, dims in self.index.items()}
        for name, dims in self.maps.items():
            for dim, matrix in dims.items():
                if matrix.shape[1] < matrix.shape[0]:  # a rotation loses nothing
                    index.setdefault(name, {})[dim] = torch.arange(matrix.shape[1])
        sizes = {name: {dim: self.sizes[name][dim] for dim in dims} for name, dims in index.items()}
        return replace(self, index=index, sizes=sizes, maps={})


def make_plan(table: AxisTable, keep: Keep, maps: Mapping[str, DimMaps] | None = None) -> ResizePlan:
    """Translate `keep` into indices of every parameter that `table` names, except where `maps` has a matrix.

    Args:
        keep: of mapped axes: the leading entries, as many as the maps leave.
        maps: parameter name -> dim -> (old length, new length), for every use of the axes that are mapped.

    Raises:
        ValueError: a programming error in the keep (unknown axis, wrong shape, indices not ascending, out of range
            or empty), in the table (two uses of one dimension that disagree) or in the maps (of another length, of
            a dimension that the table lacks, or of some uses of an axis only).
    """
    keep = {axis: index.to(device="cpu", dtype=torch.int64) for axis, index in keep.items()}
    _check_table(table)
    _check_keep(table, keep)
    after = widths_after(table.widths, keep)
    matrices = _checked_maps(table, table.with_widths(after), maps or {})
    index: dict[str, dict[int, Tensor]] = {}
    sizes: dict[str, dict[int, int]] = {n: {dim: len(m) for dim, m in dims.items()} for n, dims in matrices.items()}
    for (name, dim), blocks in table.blocks().items():
        if dim in matrices.get(name, {}):
            continue
        kept, size = _dim_index(table, blocks, keep), sum(map(table.size_of, blocks))
        if kept.numel() < size:  # ascending and in range, so as long as before means that nothing is removed
            index.setdefault(name, {})[dim] = kept
            sizes.setdefault(name, {})[dim] = size
    return ResizePlan(keep, index, sizes, dict(table.widths), after, _hash(index, sizes, matrices), matrices)


def select(tensor: Tensor, index: DimIndex) -> Tensor:
    """The surviving part of `tensor` as a new contiguous tensor; `tensor` itself when nothing leaves."""
    for dim, kept in index.items():
        tensor = tensor.index_select(dim, kept.to(tensor.device))
    return tensor


def transform(tensor: Tensor, index: DimIndex, maps: DimMaps, squared: bool = False) -> Tensor:
    """All that an event does to one whole tensor; `tensor` itself when there is nothing to do.

    Args:
        squared: maps enter squared, element by element: how second moments follow (compensation.md, section 4).

    Returns:
        A contiguous tensor of the dtype of `tensor`; contracted in that dtype, but at least in fp32.
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    selected = select(tensor, index)
    if not maps:
        return selected
    changed = selected.to(dtype)
    for dim, matrix in maps.items():
        matrix = matrix.to(tensor.device, dtype)
        changed = torch.tensordot(changed, matrix.square() if squared else matrix, ([dim], [0])).movedim(-1, dim)
    return changed.to(tensor.dtype).contiguous()


def _checked_maps(before: AxisTable, after: AxisTable, maps: Mapping[str, DimMaps]) -> dict[str, dict[int, Tensor]]:
    """The maps on the CPU, once each is known to fit the widths and every axis to be mapped in all its uses or none."""
    checked: dict[str, dict[int, Tensor]] = {}
    is_mapped: dict[tuple[str, ...], bool] = {}
    sizes_before, sizes_after = before.dim_sizes(), after.dim_sizes()
    for use in before.uses:
        matrix = maps.get(use.parameter, {}).get(use.dim)
        if is_mapped.setdefault(use.axes, matrix is not None) != (matrix is not None):
            raise ValueError(f"{use.parameter} dim {use.dim}: {use.axes} is mapped in some of its uses only")
        if matrix is None:
            continue
        shape = (sizes_before[use.parameter, use.dim], sizes_after[use.parameter, use.dim])
        if tuple(matrix.shape) != shape:
            raise ValueError(f"{use.parameter} dim {use.dim}: map of shape {tuple(matrix.shape)}, expected {shape}")
        checked.setdefault(use.parameter, {})[use.dim] = matrix.detach().cpu().contiguous()
    for name, dims in maps.items():
        if unknown := set(dims) - set(checked.get(name, {})):
            raise ValueError(f"maps name {name} dim {min(unknown)}, which the axis table lacks")
    return checked


def _dim_index(table: AxisTable, blocks: Sequence[AxisUse], keep: Keep) -> Tensor:
    """Kept indices of a dimension that is made of these blocks."""
    starts = itertools.accumulate((table.size_of(block) for block in blocks), initial=0)
    return torch.cat([start + _block_index(table, block, keep) for start, block in zip(starts, blocks, strict=False)])


def _block_index(table: AxisTable, use: AxisUse, keep: Keep) -> Tensor:
    """Kept indices of the block that `use` describes, counted from its start.

    Every kept element is a point of the grid of kept entries, one dimension per axis of the use; `entry[axis]` is its
    old index along that axis, of a shape that broadcasts to the grid.
    """
    outer, entry = outer_axes(table.widths), {}
    index = torch.zeros((), dtype=torch.int64)
    for axis in use.axes:
        kept = keep.get(axis)
        if axis not in outer:
            entry[axis] = torch.arange(table.widths[axis]) if kept is None else kept
        elif kept is None:
            entry[axis] = torch.arange(table.widths[axis])
        else:
            entry[axis] = kept[entry[outer[axis]]].squeeze(-2)  # every head or group has chosen its own
        index = index.unsqueeze(-1) * table.widths[axis] + entry[axis]
        entry = {name: index_along.unsqueeze(-1) for name, index_along in entry.items()}
    return index.flatten()


def _check_table(table: AxisTable) -> None:
    outer = outer_axes(table.widths)
    for use in table.uses:
        for i, axis in enumerate(use.axes):
            if axis in outer and outer[axis] not in use.axes[:i]:
                raise ValueError(
                    f"{use.parameter} dim {use.dim}: {axis} does not stand behind {outer[axis]}, around it"
                )


def _check_keep(table: AxisTable, keep: Keep) -> None:
    outer = outer_axes(table.widths)
    for axis, index in sorted(keep.items(), key=lambda entry: entry[0] in outer):  # what is nested comes last
        if axis not in table.widths:
            raise ValueError(f"keep names the unknown axis {axis!r}; known: {', '.join(table.widths)}")
        if axis not in outer:
            if index.ndim != 1:
                raise ValueError(f"keep[{axis!r}]: shape {tuple(index.shape)}, expected one dimension")
            _check_rows(axis, index[None], table.widths[axis])
            continue
        num_outer = table.widths[outer[axis]]
        if index.ndim != 2 or index.shape[0] != num_outer:
            raise ValueError(f"keep[{axis!r}]: shape {tuple(index.shape)}, expected ({num_outer} of {outer[axis]}, k)")
        kept_outer = keep.get(outer[axis], torch.arange(num_outer))
        _check_rows(axis, index[kept_outer], table.widths[axis])  # rows of heads that are removed do not count


def _check_rows(axis: str, rows: Tensor, size: int) -> None:
    if rows.shape[-1] == 0:
        raise ValueError(f"keep[{axis!r}] is empty; an axis keeps at least one entry")
    if int(rows.min()) < 0 or int(rows.max()) >= size:
        raise ValueError(f"keep[{axis!r}]: indices outside 0 .. {size - 1}")
    if not bool((rows[:, 1:] > rows[:, :-1]).all()):
        raise ValueError(f"keep[{axis!r}]: indices are not strictly ascending")


def _hash(index: Mapping[str, DimIndex], sizes: Mapping[str, Mapping[int, int]], maps: Mapping[str, DimMaps]) -> str:
    digest = hashlib.sha256()
    for name in sorted(index):
        for dim, kept in sorted(index[name].items()):
            digest.update(f"{name}:{dim}:{sizes[name][dim]}:{kept.numel()};".encode())
            digest.update(kept.numpy().tobytes())
    for name in sorted(maps):
        for dim, matrix in sorted(maps[name].items()):
            digest.update(f"{name}:{dim}:map {tuple(matrix.shape)};".encode())
            digest.update(matrix.numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def slice_module(module: nn.Module, plan: ResizePlan) -> None:
    """Apply `plan` to a module that no engine or optimizer holds yet; frozen parameters are sliced as well.

    Raises:
        ValueError: the plan was made for a model of other parameter names or sizes.
    """
    parameters = dict(module.named_parameters())
    index_by_parameter(parameters, plan)  # a plan for another model is refused before anything has changed
    for name in plan.sizes:
        param = parameters[name]
        set_param_data(param, transform(param.data, plan.index.get(name, {}), plan.maps.get(name, {})))


def index_by_parameter(parameters: dict[str, nn.Parameter], plan: ResizePlan) -> dict[nn.Parameter, DimIndex]:
    """The plan by parameter object. ValueError when the plan was made for a model of other names or sizes."""
    for name, sizes in plan.sizes.items():
        if name not in parameters:
            raise ValueError(
                f"resize plan names {name!r}, which the model lacks (tied parameters go by their first name)"
            )
        shape = full_shape(parameters[name])
        for dim, size in sizes.items():
            if len(shape) <= dim or shape[dim] != size:
                raise ValueError(f"resize plan: dim {dim} of {name} should be {size}, found shape {shape}")
    return {parameters[name]: index for name, index in plan.index.items()}


def set_param_data(param: nn.Parameter, data: Tensor) -> None:
    """Give `param` new data of another shape, so that the next backward works whatever still refers to the last one.

    Autograd caches an AccumulateGrad node a parameter, alive as long as any old graph is (a kept loss is enough), and
    it checks gradients against the shape at its birth. Assigning data of another dtype drops the node; another shape
    does not. Post-accumulate-grad hooks sit on the parameter and survive.
    """
    param.grad = None
    other_dtype = torch.float64 if param.dtype == torch.float32 else torch.float32
    param.data = torch.empty(0, dtype=other_dtype, device=param.device)
    param.data = data
