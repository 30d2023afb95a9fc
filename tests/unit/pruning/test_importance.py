"""Importance: dimension sums of pieces against whole tensors, axis sums by hand, smoothing, narrowing."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from homodistil.config.schema import PruningConfig
from homodistil.kernels.score_sums import add_score_sums
from homodistil.models.axes import AxisTable, AxisUse
from homodistil.pruning.importance import Importance
from homodistil.pruning.pruner import Pruner
from homodistil.pruning.schedule import WidthSchedule
from homodistil.pruning.selection import select


@dataclasses.dataclass
class _Piece:
    name: str
    start: int
    weight: torch.Tensor
    gradient: torch.Tensor


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 7),
    cuts=st.lists(st.integers(0, 42), max_size=4),
    block=st.sampled_from([1, 5, 14, 1000]),
    dims=st.sampled_from([(0,), (1,), (0, 1)]),
)
def test_sums_of_pieces_equal_sums_of_the_whole(rows, columns, cuts, block, dims):
    weight = torch.arange(rows * columns, dtype=torch.float32) + 1
    gradient = torch.where(weight % 3 == 0, -2.0, 1.0)
    edges = [0, *sorted(min(c, rows * columns) for c in cuts), rows * columns]
    row_sums = torch.zeros(rows) if 0 in dims else None
    column_sums = torch.zeros(columns) if 1 in dims else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("homodistil.kernels.score_sums.BLOCK_NUMEL", block)
        for a, b in zip(edges, edges[1:], strict=False):
            add_score_sums(weight[a:b], gradient[a:b], a, columns, row_sums, column_sums)
    scores = (weight * gradient).abs().view(rows, columns)  # small integers: exact
    assert row_sums is None or torch.equal(row_sums, scores.sum(1))
    assert column_sums is None or torch.equal(column_sums, scores.sum(0))


def test_sums_of_a_large_matrix_are_exact_to_fp32():
    torch.manual_seed(0)
    weight, gradient = torch.randn(3001 * 257), torch.randn(3001 * 257)
    row_sums, column_sums = torch.zeros(3001), torch.zeros(257)
    begin, end = 100, 3001 * 257 - 100
    add_score_sums(weight[begin:end], gradient[begin:end], begin, 257, row_sums, column_sums)
    scores = (weight.double() * gradient.double()).abs()
    scores[:begin] = scores[end:] = 0
    # 3001 positive terms, added in blocks: some roundings of 6e-8.
    torch.testing.assert_close(row_sums.double(), scores.view(3001, 257).sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(column_sums.double(), scores.view(3001, 257).sum(0), rtol=1e-6, atol=0)


# Two heads of two dims, hidden 3: a query matrix (4, 3), and a vector over hidden that is not scored.
TABLE = AxisTable(
    {"hidden": 3, "layer.0.heads": 2, "layer.0.qk_dim": 2},
    (
        AxisUse("query", 0, ("layer.0.heads", "layer.0.qk_dim")),
        AxisUse("query", 1, ("hidden",)),
        AxisUse("projection", 0, ("hidden",), scored=False),
    ),
)
SHAPES = {"query": (4, 3), "projection": (3,)}


def _importance(**changes):
    return Importance(TABLE, PruningConfig(**({"ema_beta": 0.0} | changes)), seed=0, device=torch.device("cpu"))


def _pieces(weight, gradient):
    flat_w, flat_g = weight.flatten(), gradient.flatten()
    yield _Piece("query", 0, flat_w[:5], flat_g[:5])
    yield _Piece("query", 5, flat_w[5:], flat_g[5:])
    yield _Piece("projection", 0, torch.full((3,), 1e6), torch.full((3,), 1e6))


def test_sensitivity_by_hand():
    weight = torch.tensor([[1.0, -2, 0], [0, 1, 1], [3, 0, 0], [0, 0, -1]])
    gradient = torch.tensor([[1.0, 1, 9], [9, 2, -1], [-1, 9, 9], [9, 9, 4]])
    importance = _importance()
    importance.accumulate(_pieces(weight, gradient), TABLE, SHAPES)
    scores = importance.scores()
    assert scores["hidden"].tolist() == [1 + 3, 2 + 2, 1 + 4]
    assert scores["layer.0.heads"].tolist() == [3 + 3, 3 + 4]
    assert scores["layer.0.qk_dim"].tolist() == [[3, 3], [3, 4]]


def test_per_tensor_gives_every_parameter_the_same_say():
    """A table whose scores are a thousand times those of the query decides nothing alone; a bias, which may be nothing
    but rounding, counts with its weight; and what has no scores has none."""
    uses = [AxisUse("query.weight", 0, TABLE.uses[0].axes), AxisUse("query.bias", 0, TABLE.uses[0].axes)]
    uses += [AxisUse(name, 1, ("hidden",)) for name in ("query.weight", "table.weight")]
    uses += [AxisUse("silent.bias", 0, ("hidden",))]
    weight = torch.tensor([[1.0, -2, 0], [0, 1, 1], [3, 0, 0], [0, 0, -1]])
    gradient = torch.tensor([[1.0, 1, 9], [9, 2, -1], [-1, 9, 9], [9, 9, 4]])
    words = torch.tensor([1e3, 1e3, 2e3, 0, 0, 4e3])  # (2, 3)
    pieces = [_Piece("query.weight", 0, weight.flatten()[:5], gradient.flatten()[:5])]
    pieces += [_Piece("query.weight", 5, weight.flatten()[5:], gradient.flatten()[5:])]
    pieces += [_Piece("query.bias", 0, torch.tensor([0.0, 1, 0, -2]), torch.ones(4))]
    pieces += [_Piece("table.weight", 0, words, torch.ones(6))]
    pieces += [_Piece("silent.bias", 0, torch.ones(3), torch.zeros(3))]
    shapes = {"query.weight": (4, 3), "query.bias": (4,), "table.weight": (2, 3), "silent.bias": (3,)}
    importance = _importance(score_normalisation="per_tensor")
    importance.accumulate(pieces, AxisTable(TABLE.widths, tuple(uses)), shapes)
    scores = importance.scores()
    assert scores["hidden"].tolist() == pytest.approx([4 / 16 + 1 / 8, 4 / 16 + 1 / 8, 5 / 16 + 6 / 8])
    assert scores["layer.0.heads"].tolist() == pytest.approx([7 / 16, 9 / 16])
    assert scores["layer.0.qk_dim"].flatten().tolist() == pytest.approx([3 / 16, 4 / 16, 3 / 16, 6 / 16])


def test_an_overflow_is_no_share():
    importance, weight = _importance(score_normalisation="per_tensor"), torch.ones(4, 3)
    overflow = importance.measure(_pieces(weight, weight * torch.inf), TABLE, SHAPES)
    assert not overflow["hidden"].isfinite().any()


def test_smoothing_is_an_exponential_average():
    importance = _importance(ema_beta=0.75)
    one = torch.ones(4, 3)
    for size in (1.0, 2.0):
        importance.accumulate(_pieces(one, one * size), TABLE, SHAPES)
    # 0.25 * 4 after one update, then 0.75 of it + 0.25 * 8
    assert importance.scores()["hidden"].tolist() == pytest.approx([0.75 * 1.0 + 2.0] * 3)


def test_platon_multiplies_by_the_deviation():
    importance = _importance(importance="platon", ema_beta=0.5, uncertainty_beta=0.5)
    one = torch.ones(4, 3)
    importance.accumulate(_pieces(one, one), TABLE, SHAPES)
    # average 0.5 * 4 = 2; uncertainty 0.5 * |4 - 2| = 1
    assert importance.scores()["hidden"].tolist() == pytest.approx([2.0] * 3)


def test_magnitude_ignores_gradients_and_random_repeats():
    importance = _importance(importance="magnitude", ema_beta=0.9)
    importance.accumulate(_pieces(torch.full((4, 3), -2.0), torch.zeros(4, 3)), TABLE, SHAPES)
    assert importance.scores()["hidden"].tolist() == [8.0] * 3
    first, second = _importance(importance="random"), _importance(importance="random")
    assert torch.equal(first.scores()["hidden"], second.scores()["hidden"])
    second.accumulate(iter(()), TABLE, SHAPES)
    assert not torch.equal(first.scores()["hidden"], second.scores()["hidden"])


def test_activation_keeps_nothing_of_before():
    importance = _importance(importance="activation", ema_beta=0.9)
    for size in (5.0, 2.0):
        importance.accept({"hidden": torch.full((3,), size)})
    assert importance.scores()["hidden"].tolist() == [2.0] * 3
    assert not importance.uses_training and importance.num_updates == 2


def test_narrow_keeps_the_scores_of_survivors():
    importance = _importance()
    importance.accumulate(_pieces(torch.arange(12.0).view(4, 3), torch.ones(4, 3)), TABLE, SHAPES)
    keep = {
        "hidden": torch.tensor([0, 2]),
        "layer.0.heads": torch.tensor([1]),
        "layer.0.qk_dim": torch.tensor([[0], [1]]),
    }
    before = importance.scores()
    importance.narrow(keep)
    after = importance.scores()
    assert after["hidden"].tolist() == before["hidden"][[0, 2]].tolist()
    assert after["layer.0.heads"].tolist() == before["layer.0.heads"][[1]].tolist()
    assert after["layer.0.qk_dim"].tolist() == [[before["layer.0.qk_dim"][1, 1].item()]]


def test_select_takes_the_best_in_old_order_and_spares_the_protected():
    scores = {"hidden": torch.tensor([5.0, 1, 4, 0, 3]), "layer.0.qk_dim": torch.tensor([[1.0, 2, 3], [3, 1, 2]])}
    due = {"hidden": 3, "layer.0.qk_dim": 2}
    keep = select(scores, due)
    assert keep["hidden"].tolist() == [0, 2, 4]
    assert keep["layer.0.qk_dim"].tolist() == [[1, 2], [0, 2]]
    assert select(scores, due, protected=torch.tensor([3]))["hidden"].tolist() == [0, 2, 3]


def test_a_measurement_counts_only_once_it_is_accepted():
    importance, weight = _importance(ema_beta=0.5), torch.ones(4, 3)
    importance.accumulate(_pieces(weight, weight), TABLE, SHAPES)
    before = {axis: value.clone() for axis, value in importance.scores().items()}
    count = importance.num_updates
    overflow = importance.measure(_pieces(weight, weight * torch.inf), TABLE, SHAPES)
    assert not overflow["hidden"].isfinite().any()
    for axis, value in importance.scores().items():  # the step was skipped: nobody accepts
        assert torch.equal(value, before[axis])
    assert importance.num_updates == count
    importance.accept(importance.measure(_pieces(weight, weight * 3), TABLE, SHAPES))
    assert importance.scores()["hidden"].tolist() == pytest.approx([0.5 * before["hidden"][0].item() + 0.5 * 12] * 3)


def test_an_event_waits_until_a_step_is_applied():
    config = PruningConfig(schedule="linear", interval_steps=2, end_fraction=0.4, max_event_fraction=1.0)
    widths = {"hidden": 3, "layer.0.heads": 2, "layer.0.qk_dim": 2}
    schedule = WidthSchedule(widths, {"hidden": 1}, config, steps=10)
    pruner = Pruner(schedule, _importance(), torch.tensor([], dtype=torch.int64))
    assert sorted(schedule.table) == [2, 4]
    assert pruner.due(1, TABLE.widths, torch.arange(3)) is None
    # Updates 2 to 4 were skipped, so nobody asked: update 5 finds both events.
    assert len(pruner.due(5, TABLE.widths, torch.arange(3))["hidden"]) == 1
