"""The plan and the mover against naive slicing of whole tensors, with ranks simulated in one process."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from homodistil.models.axes import AxisTable, AxisUse
from homodistil.resize.flat import FlatMove, Layout
from homodistil.resize.move import compact, set_param_data, spread
from homodistil.resize.plan import make_plan, select


@st.composite
def flat_cases(draw) -> dict:
    """Shapes of 1 to 3 dimensions, what stays of each, ranks, alignments and a chunk size far below the data."""
    params = []
    for _ in range(draw(st.integers(1, 6))):
        shape = tuple(draw(st.lists(st.integers(1, 13), min_size=1, max_size=3)))
        index = {}
        for dim, size in enumerate(shape):
            if draw(st.booleans()):
                index[dim] = torch.tensor(sorted(draw(st.sets(st.integers(0, size - 1), min_size=1))))
        params.append((shape, index))
    return {
        "params": params,
        "num_ranks": draw(st.integers(1, 8)),
        "parameter_alignment": draw(st.sampled_from([1, 4, 8])),
        "chunk_numel": draw(st.sampled_from([1, 5, 64])),
    }


def lay_out(tensors: list[Tensor], alignment: int, parameter_alignment: int) -> Tensor:
    """Flat buffer, built by appending: gaps before parameters, then padding at the end, all zero."""
    flat = torch.zeros(0)
    for tensor in tensors:
        gap = (-len(flat)) % parameter_alignment
        flat = torch.cat([flat, torch.zeros(gap), tensor.flatten()])
    return torch.cat([flat, torch.zeros((-len(flat)) % alignment)])


def naive_select(tensor: Tensor, index: dict[int, Tensor]) -> Tensor:
    lists = [index[dim].tolist() if dim in index else range(size) for dim, size in enumerate(tensor.shape)]
    values = [tensor[position].item() for position in itertools.product(*lists)]
    return torch.tensor(values).view([len(entries) for entries in lists])


@settings(max_examples=150, deadline=None)
@given(flat_cases())
def test_simulated_ranks_end_with_the_sliced_buffer(case):
    num_ranks, parameter_alignment = case["num_ranks"], case["parameter_alignment"]
    alignment = 2 * num_ranks
    tensors = [torch.randn(shape) for shape, _ in case["params"]]
    index = [kept for _, kept in case["params"]]
    old = lay_out(tensors, alignment, parameter_alignment)
    expected = lay_out(
        [naive_select(t, kept) for t, kept in zip(tensors, index, strict=True)], alignment, parameter_alignment
    )

    layout = Layout.packed([t.shape for t in tensors], num_ranks, alignment, parameter_alignment)
    assert layout.numel == len(old)
    move = FlatMove.plan(layout, index, alignment, parameter_alignment)
    assert move.new.numel == len(expected)

    survivors = []
    for rank, partition in enumerate(old.clone().chunk(num_ranks)):
        numel = compact(partition, rank * layout.partition_numel, move, case["chunk_numel"])
        survivors.append(partition[:numel])
    # The all-to-all by hand: each rank cuts its survivors by send_sizes, and the pieces are handed over.
    parcels = [held.split(move.send_sizes(rank)) for rank, held in enumerate(survivors)]
    for rank, window in enumerate(expected.chunk(num_ranks)):
        received = [parcels[other][rank] for other in range(num_ranks)]
        assert [len(parcel) for parcel in received] == move.receive_sizes(rank)
        new = torch.zeros(move.new.partition_numel)
        spread(torch.cat(received), new, rank * move.new.partition_numel, move)
        assert torch.equal(new, window)
    crossing = sum(len(p) for rank, row in enumerate(parcels) for other, p in enumerate(row) if other != rank)
    assert crossing == move.crossing_numel()


@settings(max_examples=50, deadline=None)
@given(flat_cases())
def test_pieces_cover_every_element_once(case):
    shapes = [shape for shape, _ in case["params"]]
    layout = Layout.packed(shapes, case["num_ranks"], 2 * case["num_ranks"], case["parameter_alignment"])
    owners = torch.full((layout.numel,), -1)
    for i, (shape, offset) in enumerate(zip(shapes, layout.offsets, strict=True)):
        owners[offset : offset + math.prod(shape)] = i
    seen = [torch.zeros(math.prod(shape)) for shape in shapes]
    for rank in range(case["num_ranks"]):
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
        ({"layer.0.qk_dim": [0, 1]}, "expected .3 heads"),
        ({"layer.0.qk_dim": [[0, 1], [0, 1]]}, "expected .3 heads"),
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
