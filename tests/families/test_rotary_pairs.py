"""Narrower rotary heads: the pairs that stay are those of a stock model with another theta."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from families.cases import CASES, batch_of, make_model, token_ids
from support.small import random_keep
from torch import Tensor, nn

from homodistil.config.schema import LossConfig, PruningConfig, StudentConfig
from homodistil.distill.build_student import fresh_model
from homodistil.distill.snapshot import StudentSnapshots
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.errors import UserError
from homodistil.export.stock_model import stock_model
from homodistil.models import FAMILIES, family_of
from homodistil.models.axes import Keep, kind_of
from homodistil.models.head_dim import check_head_dim, with_head_dim
from homodistil.models.resize_plan import make_plan, slice_module
from homodistil.models.rotary_pairs import (
    dims_of,
    kept_pairs,
    pairs_of,
    progression_of,
    progressions,
    runs_over_pairs,
    stock_rotary,
)
from homodistil.models.shapes import student_widths
from homodistil.pruning.pair_selection import best_progression, select_dims, select_pairs
from homodistil.pruning.pruner import width_schedule
from homodistil.pruning.schedule import stage_widths

FAMILY_MEMBERS = ["llama", "mistral", "ministral", "qwen2", "qwen3"]
PROGRESSIONS = [range(2, 3), *progressions(4, 2), *progressions(4, 3)]


def pair_keep(student: Student, pairs: list[int], seed: int = 0) -> Keep:
    """The current `pairs` of all heads; every group of every layer chooses its own dims of values."""
    table = student.axis_table()
    values = {axis: 2 * len(pairs) for axis in table.widths if kind_of(axis) == "vo_dim"}
    keep = random_keep(table, values, seed)
    for axis, width in table.widths.items():
        if runs_over_pairs(axis, table.widths):
            dims = dims_of(torch.tensor(pairs), width // 2)
            keep[axis] = dims.repeat(3, 1) if kind_of(axis) == "qk_dim" else dims
    return keep


def cut(student: Student, keep: Keep) -> None:
    slice_module(student, make_plan(student.axis_table(), keep))
    student.after_resize(keep)


def exported(model_type: str, student: Student) -> nn.Module:
    weights = {name: parameter.detach() for name, parameter in student.named_parameters()}
    return stock_model(weights, student, CASES[model_type].make_config())


@torch.no_grad()
def teacher_without(model_type: str, keep: Keep) -> nn.Module:
    """The teacher with zeros where `keep` leaves something out: heads as wide as ever, and the angles of the class."""
    model = make_model(model_type)
    for i, layer in enumerate(model.model.layers):
        attention, left = layer.self_attn, torch.zeros(3, 8)
        for group, dims in enumerate(keep[f"layer.{i}.vo_dim"]):
            left[group, dims] = 1
        mask_rows(attention.v_proj, left.flatten())
        left = torch.zeros(8).index_fill(0, keep[f"layer.{i}.qk_dim"][0], 1)
        mask_rows(attention.q_proj, left.repeat(6))
        mask_rows(attention.k_proj, left.repeat(3))
        for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)):
            if norm is not None:  # the mean of squares is over the dims that are left
                norm.weight.mul_(left.mean() ** 0.5)
                norm.variance_epsilon *= float(left.mean())
    return model


def mask_rows(linear: nn.Linear, left: Tensor) -> None:
    linear.weight.mul_(left[:, None])
    if linear.bias is not None:
        linear.bias.mul_(left)


@pytest.mark.parametrize("pairs", PROGRESSIONS, ids=str)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_a_progression_is_a_stock_model(model_type, pairs):
    """The student, the stock model that it becomes, and the teacher with the other dims silenced."""
    student = Student(make_model(model_type), LossConfig()).eval()
    keep = pair_keep(student, [*pairs])
    cut(student, keep)
    stock, ids = exported(model_type, student), token_ids()
    assert stock.config.head_dim == 2 * len(pairs) == stock.model.layers[0].self_attn.head_dim
    with torch.no_grad():
        expected = teacher_without(model_type, keep)(input_ids=ids).logits
        for model in (student.model, stock):
            torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", FAMILY_MEMBERS)
def test_heads_get_narrower_in_steps(model_type, tmp_path):
    """Pairs 0, 1, 3, which no class has, then 1 and 3; snapshots follow, and the file is a stock one."""
    student = Student(make_model(model_type), LossConfig()).eval()
    snapshots = StudentSnapshots(student)
    cut(student, pair_keep(student, [0, 1, 3], seed=1))
    assert kept_pairs(student.origins).tolist() == [0, 1, 3]
    with pytest.raises(ValueError, match="no progression"):
        exported(model_type, student)
    batch = batch_of(token_ids())
    beside, alone = (student(batch, Teacher(make_model(model_type), way)(batch)).terms for way in (True, False))
    assert beside == alone
    cut(student, pair_keep(student, [1, 2], seed=2))
    assert student.widths["layer.1.qk_dim"] == student.widths["layer.1.vo_dim"] == 4
    copy_of_it = snapshots.make({name: p.detach() for name, p in student.named_parameters()}, torch.float32).eval()
    exported(model_type, student).save_pretrained(tmp_path)
    loaded, ids = type(student.model).from_pretrained(tmp_path).eval(), token_ids()
    with torch.no_grad():
        expected = student.model(input_ids=ids).logits
        assert torch.equal(copy_of_it.model(input_ids=ids).logits, expected)
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert loaded.config.rope_parameters["rope_type"] == "linear" and loaded.config.head_dim == 4
    generated = loaded.generate(ids[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    with torch.no_grad():  # the cache holds turned keys
        again = loaded(input_ids=generated[:, :-1], use_cache=False).logits[:, ids.shape[1] - 1 :].argmax(-1)
    assert torch.equal(again, generated[:, ids.shape[1] :])


@pytest.mark.parametrize("pairs", [p for length in (1, 5, 8) for p in progressions(16, length)], ids=str)
def test_angles_are_the_teachers(pairs):
    """In fp64, and of the library's own function in fp32."""
    theta = 500000.0
    of_teacher = theta ** (-torch.arange(16, dtype=torch.float64) / 16)
    rope = stock_rotary(pairs, 16, theta)
    angles = rope["rope_theta"] ** (-torch.arange(len(pairs), dtype=torch.float64) / len(pairs)) / rope.get("factor", 1)
    torch.testing.assert_close(angles, of_teacher[torch.tensor(pairs)], rtol=1e-12, atol=0)
    assert progression_of(torch.tensor(pairs)) == pairs or len(pairs) == 1


def test_every_second_pair_keeps_theta():
    assert stock_rotary(range(0, 16, 2), 16, 1e4) == {"rope_type": "default", "rope_theta": 1e4}


def test_the_best_progression_is_the_best_of_all():
    """Against every choice of pairs that is a progression."""
    scores = torch.rand(9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    kept = torch.tensor([0, 1, 2, 4, 5, 7, 8, 9, 11])
    for length in range(1, 5):
        choices = [c for c in itertools.combinations(range(9), length) if len({*_steps(kept[list(c)])}) <= 1]
        best = max(choices, key=lambda c: float(scores[list(c)].sum()))
        assert best_progression(scores, kept, length).tolist() == [*best]
        chosen = select_pairs(scores, kept, length + 2, length).tolist()
        rest = sorted({*range(9)} - {*best}, key=lambda i: -float(scores[i]))[:2]
        assert chosen == sorted({*best, *rest})


def _steps(origins: Tensor) -> list[int]:
    return origins.diff().tolist()


def test_all_heads_of_all_layers_decide_and_lose_the_same():
    generator = torch.Generator().manual_seed(0)
    scores = {"layer.0.kv_heads": torch.zeros(3), "layer.1.kv_heads": torch.zeros(3)}
    scores |= {f"layer.{i}.qk_dim": torch.rand(3, 12, generator=generator) for i in range(2)}
    scores |= {f"layer.{i}.vo_dim": torch.rand(3, 12, generator=generator) for i in range(2)}
    scores["head_norm"] = torch.rand(12, generator=generator)
    axes = ("layer.0.qk_dim", "layer.1.qk_dim", "head_norm")
    keep = select_dims(scores, dict.fromkeys((*axes, "layer.0.vo_dim"), 8), torch.arange(6), 6)
    assert set(keep) == set(axes) and keep["layer.0.qk_dim"].shape == (3, 8)
    total = sum(scores[f"layer.{i}.qk_dim"].sum(0) for i in range(2)) + scores["head_norm"]
    expected = dims_of(select_pairs((total[:6] + total[6:]).double(), torch.arange(6), 4, 3), 6)
    for axis in axes:
        assert (keep[axis] == expected).all()
    assert pairs_of(keep["head_norm"]).tolist() == expected[:4].tolist()


@pytest.mark.parametrize("schedule", ["cubic", "linear"])
def test_widths_on_the_way_are_even_and_those_of_values_too(schedule):
    initial = {"hidden": 64, "layer.0.ffn": 64, "layer.0.kv_heads": 3, "layer.0.heads_in_group": 2}
    initial |= {"layer.0.qk_dim": 64, "layer.0.vo_dim": 64, "head_norm": 64}
    target = with_head_dim(initial | {"layer.0.kv_heads": 2}, 26)
    pruning = PruningConfig(schedule=schedule, interval_steps=1)
    table = width_schedule(pruning, 400, initial, target).table
    dims = [widths["head_norm"] for widths in table.values() if "head_norm" in widths]
    assert len(dims) > 8 and dims[-1] == 26 and all(width % 2 == 0 for width in dims)
    for axis in ("layer.0.qk_dim", "layer.0.vo_dim"):
        assert [widths[axis] for widths in table.values() if axis in widths] == dims
    stages = [stage["layer.0.qk_dim"] for stage in stage_widths(initial, target, 5)]
    assert stages[-1] == 26 and all(width % 2 == 0 for width in stages)
    alone = width_schedule(pruning, 400, initial, {**initial, "layer.0.kv_heads": 2}).table
    groups = [[step for step, widths in t.items() if "layer.0.kv_heads" in widths] for t in (table, alone)]
    assert groups[0] == groups[1]


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_who_may_ask_for_narrower_heads(model_type):
    family, config = family_of(model_type), CASES[model_type].make_config()
    teacher = family.axis_table(make_model(model_type)).widths
    check_head_dim(None, family, config, teacher)
    if model_type in FAMILY_MEMBERS:
        for head_dim in (2, 4, 6, 8):
            check_head_dim(head_dim, family, config, teacher)
            _, target = student_widths(StudentConfig(preset="teacher", head_dim=head_dim), teacher)
            assert {w for axis, w in target.items() if kind_of(axis) in ("qk_dim", "vo_dim", "head_norm")} == {head_dim}
            assert family.stock_head_dim(target) == head_dim
        for head_dim in (0, 3, 10, -2):
            with pytest.raises(UserError, match=f"student.head_dim: found {head_dim}, allowed are even"):
                check_head_dim(head_dim, family, config, teacher)
        config = copy.deepcopy(config)
        config.rope_parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UserError, match="student.head_dim: found 4, but"):
        check_head_dim(4, family, config, teacher)


def test_fresh_weights_have_the_narrow_heads_of_their_class():
    config = CASES["llama"].make_config()
    teacher = family_of("llama").axis_table(make_model("llama")).widths
    model = fresh_model(config, with_head_dim(teacher, 4), 0.0)
    student = Student(model.eval(), LossConfig())
    student.after_resize({})
    stock, ids = exported("llama", student), token_ids()
    assert stock.config.rope_parameters == config.rope_parameters and stock.config.head_dim == 4
    with torch.no_grad():
        torch.testing.assert_close(stock(input_ids=ids).logits, student.model(input_ids=ids).logits)
