"""pruning.importance=activation on every architecture, against a loop over entries and sequences in float64."""

from __future__ import annotations

import math

import pytest
import torch
from families.cases import LAYERS, batch_of, make_model, token_ids
from torch import Tensor, nn

from homodistil.config.schema import LossConfig, PruningConfig
from homodistil.data.batch import Batch
from homodistil.distill.student import Student
from homodistil.errors import UserError
from homodistil.models import FAMILIES
from homodistil.models.axes import AxisTable, AxisUse, kind_of, outer_axes
from homodistil.models.head_dim import with_head_dim
from homodistil.models.resize_plan import make_plan, slice_module
from homodistil.models.rotary_pairs import kept_pairs, runs_over_pairs
from homodistil.pruning.activation_scores import activation_scores
from homodistil.pruning.importance import Importance
from homodistil.pruning.pruner import Pruner, width_schedule

MODEL_TYPES = sorted(FAMILIES)
FFN_OUTPUTS = ("output.dense", "lin2", "down_proj", "mlp.Wo", "mlp.c_proj")
ATTENTION_OUTPUTS = ("attention.output.dense", "out_lin", "attn.o", "o_proj", "attn.Wo", "attn.c_proj")
"""Ends of the names of the linears that write to the residual stream; MPNet's feed-forward block has BERT's."""
# Sums of 34 fp32 absolute values, squared: about ten roundings of 6e-8.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-8}


def make_student(model_type: str, model: nn.Module | None = None) -> Student:
    return Student(model or make_model(model_type), LossConfig())


def make_batches() -> list[list[Batch]]:
    """Two global batches, of two and of one micro-batch; one sequence has padding."""
    batches = [batch_of(token_ids(seed=seed)) for seed in range(3)]
    batches[1].attention_mask[1, -5:] = 0
    valid = batches[1].attention_mask.flatten().nonzero().squeeze(1)
    batches[1] = batches[1]._replace(token_index=valid)
    return [batches[:2], batches[2:]]


class Seen:
    """Everything that goes by, as lists of (T, n) float64 for each sequence, without its padding."""

    def __init__(self, model_type: str, student: Student) -> None:
        self.places: dict[str, list[Tensor]] = {}
        self._mask = torch.empty(0)
        model = student.model
        for name, norm in student.family.layer_norms(model).items():
            norm.register_forward_hook(lambda _m, _i, output, name=name: self.add(f"norm {name}", output))
        for i, layer in enumerate(student.family.layers(model)):
            for name, module in layer.named_modules():
                is_attention, is_ffn = name.endswith(ATTENTION_OUTPUTS), name.endswith(FFN_OUTPUTS)
                kind = "context" if is_attention else "neurons" if is_ffn else None
                if kind:
                    at = f"{kind} {i}"
                    module.register_forward_pre_hook(lambda _m, inputs, at=at: self.add(at, inputs[0]))

    def add(self, place: str, activations: Tensor) -> None:
        for row, mask in zip(activations, self._mask, strict=True):
            self.places.setdefault(place, []).append(row[mask.bool()].double())

    def look_at(self, student: Student, batch: Batch) -> None:
        self._mask = batch.attention_mask
        with torch.no_grad():
            seen = student._taps.run(batch.input_ids, batch.padding_mask)
        for i, (queries, keys) in enumerate(zip(seen.queries, seen.keys, strict=True)):
            for kind, heads in (("queries", queries), ("keys", keys)):
                self.add(f"{kind} {i}", torch.stack([torch.cat([*sequence], -1) for sequence in heads]))

    def score(self, place: str, columns: list[int]) -> float:
        """L2 over sequences and `columns` of the mean over tokens of |x|."""
        return math.sqrt(sum(float(x[:, columns].abs().mean(0).square().sum()) for x in self.places[place]))


def naive_scores(model_type: str, batches: list[list[Batch]]) -> dict[str, Tensor]:
    student = make_student(model_type).eval()
    seen, widths = Seen(model_type, student), student.widths
    for batch in sum(batches, []):
        seen.look_at(student, batch)
    expected = {"hidden": torch.zeros(widths["hidden"])}
    for place in (name for name in seen.places if name.startswith("norm")):
        expected["hidden"] += torch.tensor([seen.score(place, [j]) for j in range(widths["hidden"])])
    for i in range(LAYERS):
        ffn = widths[f"layer.{i}.ffn"]
        expected[f"layer.{i}.ffn"] = torch.tensor([seen.score(f"neurons {i}", [j]) for j in range(ffn)])
        for axis, score in head_scores(seen, widths, i).items():
            expected[axis] = expected.get(axis, 0) + score
    return expected


def head_scores(seen: Seen, widths: dict[str, int], i: int) -> dict[str, Tensor]:
    """Groups of one head where heads have keys and values of their own."""
    vo, qk, context = widths[f"layer.{i}.vo_dim"], widths[f"layer.{i}.qk_dim"], f"context {i}"
    heads_name = f"layer.{i}.heads" if f"layer.{i}.heads" in widths else "heads"
    is_grouped = f"layer.{i}.kv_heads" in widths
    groups = widths[f"layer.{i}.kv_heads"] if is_grouped else widths[heads_name]
    in_group = widths[f"layer.{i}.heads_in_group"] if is_grouped else 1

    def columns(group: int, heads: range, dims: range, size: int) -> list[int]:
        return [(group * in_group + head) * size + dim for head in heads for dim in dims]

    every, whole = range(in_group), range(vo)
    of_groups = torch.tensor([seen.score(context, columns(g, every, whole, vo)) for g in range(groups)])
    scores = {f"layer.{i}.kv_heads" if is_grouped else heads_name: of_groups}
    if is_grouped:
        rows = [[seen.score(context, columns(g, range(h, h + 1), whole, vo)) for h in every] for g in range(groups)]
        scores[f"layer.{i}.heads_in_group"] = torch.tensor(rows)
    rows = [[seen.score(context, columns(g, every, range(d, d + 1), vo)) for d in whole] for g in range(groups)]
    scores[f"layer.{i}.vo_dim"] = torch.tensor(rows)
    of_queries, of_keys = (
        [[seen.score(f"{kind} {i}", at(g, d)) for d in range(qk)] for g in range(groups)]
        for kind, at in (
            ("queries", lambda g, d: columns(g, every, range(d, d + 1), qk)),
            ("keys", lambda g, d: [g * qk + d]),
        )
    )
    scores[f"layer.{i}.qk_dim"] = torch.tensor(of_queries) + torch.tensor(of_keys)
    return scores


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_scores_are_those_of_a_naive_loop(model_type):
    student, batches = make_student(model_type).train(), make_batches()
    scores = activation_scores(student, batches)
    assert student.training and not any(m._forward_hooks for m in student.family.layer_norms(student.model).values())
    expected = naive_scores(model_type, batches)
    unmeasured = set(student.widths) - set(scores)
    assert unmeasured <= {"head_norm"} and set(scores) - set(expected) <= {"embedding"}
    for axis, value in expected.items():
        assert scores[axis].dtype == torch.float32
        torch.testing.assert_close(scores[axis], value.float(), msg=lambda text, a=axis: f"{a}: {text}", **TOLERANCE)


@pytest.mark.parametrize("model_type", ["llama", "modernbert", "mpnet"])
def test_scores_follow_a_cut(model_type):
    """A cut student is scored at its current widths, and an axis that has lost nothing keeps its shape."""
    student = make_student(model_type)
    table = student.axis_table()
    outer = outer_axes(table.widths)
    keep = {a: torch.arange(w - 1) for a, w in table.widths.items() if w > 2 and a not in outer and _may_fall(a)}
    slice_module(student, make_plan(table, keep))
    student.after_resize(keep)
    scores = activation_scores(student, make_batches())
    assert all(scores[axis].shape[-1] == student.widths[axis] for axis in scores)
    assert len(scores["hidden"]) == table.widths["hidden"] - 1


def _may_fall(axis: str) -> bool:
    return kind_of(axis) in ("hidden", "ffn", "heads", "kv_heads")


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_rotary_pairs_go_by_queries_and_keys(model_type):
    """The best progression of two of the four pairs, by what all queries and keys of all layers have of them."""
    student = make_student(model_type)
    importance = Importance(student.axis_table(), PruningConfig(importance="activation"), 0, torch.device("cpu"))
    importance.accept(activation_scores(student, make_batches()))
    target = with_head_dim(student.widths, 4)
    due = {axis: width for axis, width in target.items() if width < student.widths[axis]}
    schedule = width_schedule(PruningConfig(schedule="one_shot"), 10, student.widths, target)
    pruner = Pruner(schedule, importance, torch.tensor([], dtype=torch.int64))
    keep = pruner.keep_of(due, student.origins["hidden"], kept_pairs(student.origins))
    expected = naive_scores(model_type, make_batches())
    of_dims = sum(expected[f"layer.{i}.qk_dim"].sum(0) for i in range(LAYERS)).tolist()
    of_pairs = [of_dims[pair] + of_dims[pair + 4] for pair in range(4)]
    best = max(([0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]), key=lambda pairs: sum(of_pairs[p] for p in pairs))
    rotary = [axis for axis in due if runs_over_pairs(axis, student.widths)]
    assert len(rotary) == LAYERS + (model_type == "qwen3")
    for axis in rotary:
        assert keep[axis].unique().tolist() == [*best, *(pair + 4 for pair in best)]
    slice_module(student, make_plan(student.axis_table(), keep))
    student.after_resize(keep)
    assert student.widths == target


def test_an_axis_that_shows_nowhere_is_refused():
    student = make_student("bert")
    table = student.family.axis_table(student.model)
    strange = AxisTable(table.widths | {"layer.0.experts": 2}, (*table.uses, AxisUse("x", 0, ("layer.0.experts",))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(student.family), "axis_table", lambda self, model: _without_strange(strange))
        with pytest.raises(UserError, match=r"pruning.importance: found activation, but no .* layer.0.experts; set"):
            activation_scores(student, make_batches())


def _without_strange(table: AxisTable) -> AxisTable:
    return AxisTable(table.widths, table.uses[:-1])
