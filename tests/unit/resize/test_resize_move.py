"""The plan and the mover against numpy's slicing of whole tensors; ranks are threads, the exchange is real gloo."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.thread_ranks import on_every_rank
from torch import Tensor

from homodistil.models.axes import AxisTable, AxisUse
from homodistil.models.resize_plan import make_plan, select, set_param_data
from homodistil.resize import move_partitions as partition_mover
from homodistil.resize.flat import WHOLE, FlatMove, Layout
from homodistil.resize.move import compact, exchange, move_partition
from homodistil.resize.move_partitions import move_partitions

NUM_CASES = 300
LEAVES: dict[int, list[int]] = {0: []}
"""What is kept of a parameter that leaves as a whole."""


@dataclass(frozen=True)
class Case:
    """Parameters and what stays of each, and how they are spread over ranks."""

    shapes: list[tuple[int, ...]]
    kept: list[dict[int, list[int]]]
    num_ranks: int
    alignment: int
    parameter_alignment: int
    chunk_numel: int | None
    """Far below the data; None: the product's own."""

    def arrays(self) -> list[np.ndarray]:
        """Every element of every parameter has a value of its own, and none is zero."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        starts = [0, *ends[:-1]]
        return [np.arange(a, b).reshape(s) + 1.0 for a, b, s in zip(starts, ends, self.shapes, strict=True)]

    def survivors(self) -> list[np.ndarray]:
        grids = []
        for shape, kept in zip(self.shapes, self.kept, strict=True):
            grids.append(np.ix_(*[kept.get(dim, range(size)) for dim, size in enumerate(shape)]))
        return [array[grid] for array, grid in zip(self.arrays(), grids, strict=True)]

    def index(self) -> list[dict[int, Tensor]]:
        as_index = functools.partial(torch.tensor, dtype=torch.int64)
        return [WHOLE if kept == LEAVES else {dim: as_index(i) for dim, i in kept.items()} for kept in self.kept]

    def layout(self) -> Layout:
        return Layout.packed(self.shapes, self.num_ranks, self.alignment, self.parameter_alignment)


@st.composite
def cases(draw) -> Case:
    """Shapes of 1 to 3 dimensions, many of length 1; up to 8 ranks, of which some may hold nothing but padding. Some
    parameters leave as a whole."""
    shapes, kept = [], []
    for _ in range(draw(st.integers(1, 6))):
        shape = tuple(draw(st.lists(st.one_of(st.just(1), st.integers(1, 13)), min_size=1, max_size=3)))
        cut = [dim for dim in range(len(shape)) if draw(st.booleans())]
        shapes.append(shape)
        kept.append({dim: sorted(draw(st.sets(st.integers(0, shape[dim] - 1), min_size=1))) for dim in cut})
    stays = draw(st.integers(0, len(shapes) - 1))
    kept = [k if i == stays or draw(st.integers(0, 3)) else LEAVES for i, k in enumerate(kept)]
    num_ranks = draw(st.integers(1, 8))
    alignment = num_ranks * draw(st.sampled_from([1, 2, 16]))
    parameter_alignment, chunk_numel = draw(st.sampled_from([1, 4, 8])), draw(st.sampled_from([1, 5, 64, None]))
    return Case(shapes, kept, num_ranks, alignment, parameter_alignment, chunk_numel)


def lay_out(arrays: list[np.ndarray], case: Case, filler: float) -> np.ndarray:
    """Flat buffer, built by appending: gaps before parameters, then padding at the end."""
    flat = np.zeros(0)
    for array in filter(np.size, arrays):
        gap = -len(flat) % case.parameter_alignment
        flat = np.concatenate([flat, np.full(gap, filler), array.flatten()])
    return np.concatenate([flat, np.full(-len(flat) % case.alignment, filler)])


def partitions(flat: np.ndarray, num_ranks: int) -> list[Tensor]:
    return [torch.tensor(part, dtype=torch.float32) for part in np.split(flat, num_ranks)]


@settings(max_examples=NUM_CASES)
@given(cases())
def test_ranks_end_with_the_sliced_buffer(case: Case):
    # NaN where nothing lies: whatever stands in a gap must not survive.
    old = partitions(lay_out(case.arrays(), case, math.nan), case.num_ranks)
    expected = partitions(lay_out(case.survivors(), case, 0.0), case.num_ranks)
    move = FlatMove.plan(case.layout(), case.index(), case.alignment, case.parameter_alignment)

    def move_own(rank: int, group: dist.ProcessGroup) -> Tensor:
        if case.chunk_numel is None:
            return move_partition(old[rank], move, rank, group)
        numel = compact(old[rank], rank * move.old.partition_numel, move, case.chunk_numel)
        return exchange(old[rank][:numel], move, rank, group)

    found = on_every_rank(case.num_ranks, move_own)
    assert all(map(torch.equal, found, expected))
    if case.chunk_numel is None:
        assert all(partition.untyped_storage().nbytes() == 0 for partition in old), "the old partition is still there"


@settings(max_examples=NUM_CASES // 2)
@given(cases())
def test_ranks_end_with_sliced_partitions_of_every_parameter(case: Case):
    """As ZeRO-3 has it: each parameter is cut over all ranks; padding is zero there, old and new."""

    def cut(arrays: list[np.ndarray]) -> list[list[Tensor]]:
        """Parameter -> rank -> its partition."""
        padded = [np.pad(array.flatten(), (0, -array.size % case.alignment)) for array in arrays]
        return [partitions(flat, case.num_ranks) for flat in padded]

    old, expected = cut(case.arrays()), cut(case.survivors())
    moves = [
        FlatMove.plan(Layout.packed([shape], case.num_ranks, case.alignment), [index], case.alignment)
        for shape, index in zip(case.shapes, case.index(), strict=True)
    ]

    def move_own(rank: int, group: dist.ProcessGroup) -> list[Tensor]:
        new = [torch.zeros(move.new.partition_numel) for move in moves]
        move_partitions([parts[rank] for parts in old], new, moves, rank, group, torch.device("cpu"))
        return new

    with mock.patch.object(partition_mover, "CHUNK_NUMEL", case.chunk_numel or partition_mover.CHUNK_NUMEL):
        found = on_every_rank(case.num_ranks, move_own)
    for i, by_rank in enumerate(expected):
        assert all(torch.equal(found[rank][i], partition) for rank, partition in enumerate(by_rank)), i


@settings(max_examples=100)
@given(cases())
def test_crossing_counts_what_changes_rank(case: Case):
    def owners(arrays: list[np.ndarray]) -> dict[float, int]:
        """Value -> rank; values are unique and not zero."""
        parts = np.split(lay_out(arrays, case, 0.0), case.num_ranks)
        return {value: rank for rank, part in enumerate(parts) for value in part if value}

    before, after = owners(case.arrays()), owners(case.survivors())
    move = FlatMove.plan(case.layout(), case.index(), case.alignment, case.parameter_alignment)
    assert move.crossing_numel() == sum(before[value] != rank for value, rank in after.items())


@settings(max_examples=100)
@given(cases())
def test_pieces_cover_every_element_once(case: Case):
    layout = case.layout()
    owners = torch.full((layout.numel,), -1)
    for i, (shape, offset) in enumerate(zip(case.shapes, layout.offsets, strict=True)):
        owners[offset : offset + math.prod(shape)] = i
    seen = [torch.zeros(math.prod(shape)) for shape in case.shapes]
    for rank in range(case.num_ranks):
        window = owners[rank * layout.partition_numel : (rank + 1) * layout.partition_numel]
        for parameter, position, start, numel in layout.partition_pieces(rank):
            assert (window[position : position + numel] == parameter).all()
            seen[parameter][start : start + numel] += 1
    assert all((count == 1).all() for count in seen)


WIDTHS = {"hidden": 5, "layer.0.ffn": 7, "layer.0.heads": 3, "layer.0.qk_dim": 4, "layer.0.vo_dim": 2}
TABLE = AxisTable(
    WIDTHS,
    (
        AxisUse("query.weight", 0, ("layer.0.heads", "layer.0.qk_dim")),
        AxisUse("query.weight", 1, ("hidden",)),
        AxisUse("value.weight", 0, ("layer.0.heads", "layer.0.vo_dim")),
        AxisUse("up.bias", 0, ("layer.0.ffn",)),
    ),
)


def test_heads_choose_their_own_dims():
    qk_dim = torch.tensor([[0, 3], [9, 9], [1, 2]])  # row 1 belongs to a head that goes: ignored, even nonsense
    keep = {"layer.0.heads": torch.tensor([0, 2]), "layer.0.qk_dim": qk_dim, "hidden": torch.arange(5)}
    plan = make_plan(TABLE, keep)
    assert {n: {d: i.tolist() for d, i in dims.items()} for n, dims in plan.index.items()} == {
        "query.weight": {0: [0, 3, 9, 10]},  # head 2 begins at row 8; hidden loses nothing and is left out
        "value.weight": {0: [0, 1, 4, 5]},
    }
    assert plan.sizes == {"query.weight": {0: 12}, "value.weight": {0: 6}}
    assert plan.widths_before == WIDTHS
    assert plan.widths_after == WIDTHS | {"layer.0.heads": 2, "layer.0.qk_dim": 2}
    weight = torch.arange(60.0).view(12, 5)
    assert torch.equal(select(weight, plan.index["query.weight"]), weight[[0, 3, 9, 10]])


def test_hash_tells_events_apart():
    def hash_of(keep: dict, table: AxisTable = TABLE) -> str:
        return make_plan(table, {axis: torch.tensor(kept) for axis, kept in keep.items()}).hash

    same = hash_of({"layer.0.ffn": [0, 2], "hidden": [1]})
    assert same == hash_of({"hidden": [1], "layer.0.ffn": [0, 2]})
    others = [{"layer.0.ffn": [0, 3], "hidden": [1]}, {"layer.0.ffn": [0, 2]}, {"layer.0.ffn": [0, 2], "hidden": [2]}]
    wider = TABLE.with_widths({"layer.0.ffn": 8})  # the same indices out of another width are another event
    hashes = [same, *map(hash_of, others), hash_of({"layer.0.ffn": [0, 2], "hidden": [1]}, wider)]
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"layer.1.ffn": [0]}, "unknown axis"),
        ({"hidden": [0, 5]}, "outside 0 .. 4"),
        ({"hidden": [-1, 2]}, "outside 0 .. 4"),
        ({"hidden": [2, 1]}, "not strictly ascending"),
        ({"hidden": [1, 1]}, "not strictly ascending"),
        ({"hidden": []}, "empty"),
        ({"hidden": [[0, 1]]}, "expected one dimension"),
        ({"layer.0.qk_dim": [0, 1]}, "expected .3 of layer.0.heads, k"),
        ({"layer.0.qk_dim": [[0, 1], [0, 1]]}, "expected .3 of layer.0.heads, k"),
        ({"layer.0.qk_dim": [[0, 1], [2, 1], [0, 1]]}, "not strictly ascending"),
        ({"layer.0.heads": [3], "layer.0.qk_dim": [[0], [0], [0]]}, "outside 0 .. 2"),
    ],
)
def test_wrong_keeps_are_refused(keep, message):
    with pytest.raises(ValueError, match=message):
        make_plan(TABLE, {axis: torch.tensor(kept, dtype=torch.int64) for axis, kept in keep.items()})


def test_contradicting_table_is_refused():
    table = TABLE.with_uses([AxisUse("up.bias", 0, ("layer.0.other",))]).with_widths({"layer.0.other": 7})
    keep = {"layer.0.ffn": torch.tensor([0, 1]), "layer.0.other": torch.tensor([0, 2])}
    with pytest.raises(ValueError, match="two uses"):
        make_plan(table, keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_data_under_a_living_graph(dtype):
    """The last loss is still referenced when the parameter shrinks; hooks go on firing, once a backward."""
    param = torch.nn.Parameter(torch.ones(6, 4, dtype=dtype))
    fired = []
    param.register_post_accumulate_grad_hook(lambda p: fired.append(tuple(p.grad.shape)))
    loss = (param * 2).sum()
    loss.backward()
    set_param_data(param, torch.ones(4, 3, dtype=dtype))
    (param * 3).sum().backward()
    assert torch.equal(param.grad, torch.full((4, 3), 3, dtype=dtype))
    assert fired == [(6, 4), (4, 3)]
    assert loss.item() == 48
