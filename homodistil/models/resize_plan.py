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
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from homodistil.models.axes import AxisTable, AxisUse, Keep, head_axes, widths_after
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
    for use in table.uses:
        if use.dim in matrices.get(use.parameter, {}):
            continue
        kept, size = _use_index(table, use, keep), table.dim_size(use)
        if kept is None or kept.numel() == size:  # ascending, in range and as long as before: nothing leaves
            continue
        known = index.setdefault(use.parameter, {}).setdefault(use.dim, kept)
        if not torch.equal(known, kept):
            raise ValueError(f"{use.parameter} dim {use.dim}: two uses in the table keep different indices")
        sizes.setdefault(use.parameter, {})[use.dim] = size
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
    for use in before.uses:
        matrix = maps.get(use.parameter, {}).get(use.dim)
        if is_mapped.setdefault(use.axes, matrix is not None) != (matrix is not None):
            raise ValueError(f"{use.parameter} dim {use.dim}: {use.axes} is mapped in some of its uses only")
        if matrix is None:
            continue
        shape = (before.dim_size(use), after.dim_size(use))
        if tuple(matrix.shape) != shape:
            raise ValueError(f"{use.parameter} dim {use.dim}: map of shape {tuple(matrix.shape)}, expected {shape}")
        checked.setdefault(use.parameter, {})[use.dim] = matrix.detach().cpu().contiguous()
    for name, dims in maps.items():
        if unknown := set(dims) - set(checked.get(name, {})):
            raise ValueError(f"maps name {name} dim {min(unknown)}, which the axis table lacks")
    return checked


def _use_index(table: AxisTable, use: AxisUse, keep: Keep) -> Tensor | None:
    """Kept indices of the dimension that `use` describes, None when none of its axes changes."""
    if not any(axis in keep for axis in use.axes):
        return None
    if len(use.axes) == 1:
        return keep[use.axes[0]]
    heads_axis, dim_axis = use.axes
    num_heads, head_dim = table.widths[heads_axis], table.widths[dim_axis]
    heads = keep.get(heads_axis, torch.arange(num_heads))
    dims = keep.get(dim_axis, torch.arange(head_dim).expand(num_heads, head_dim))
    return (heads[:, None] * head_dim + dims[heads]).flatten()  # laid out head by head


def _check_table(table: AxisTable) -> None:
    heads_of = head_axes(table.widths)
    for use in table.uses:
        one_axis = len(use.axes) == 1 and use.axes[0] not in heads_of
        per_head = len(use.axes) == 2 and heads_of.get(use.axes[1]) == use.axes[0]
        if not (one_axis or per_head):
            raise ValueError(f"{use.parameter} dim {use.dim}: {use.axes} is neither one axis nor (heads, head dim)")


def _check_keep(table: AxisTable, keep: Keep) -> None:
    heads_of = head_axes(table.widths)
    for axis, index in sorted(keep.items(), key=lambda entry: entry[0] in heads_of):  # heads before what is per head
        if axis not in table.widths:
            raise ValueError(f"keep names the unknown axis {axis!r}; known: {', '.join(table.widths)}")
        if axis not in heads_of:
            if index.ndim != 1:
                raise ValueError(f"keep[{axis!r}]: shape {tuple(index.shape)}, expected one dimension")
            _check_rows(axis, index[None], table.widths[axis])
            continue
        num_heads = table.widths[heads_of[axis]]
        if index.ndim != 2 or index.shape[0] != num_heads:
            raise ValueError(f"keep[{axis!r}]: shape {tuple(index.shape)}, expected ({num_heads} heads, dims)")
        kept_heads = keep.get(heads_of[axis], torch.arange(num_heads))
        _check_rows(axis, index[kept_heads], table.widths[axis])  # rows of heads that go do not count


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
