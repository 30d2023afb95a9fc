"""The policy: sizes divide, rise as widths fall, stay within the budget. And the samples, the same for any size."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small import small_model
from test_data_loader import loader, make_rows, samples_in

from homodistil.config.schema import RunConfig
from homodistil.data.loader import BatchLoader
from homodistil.distill.student import Student
from homodistil.errors import UserError
from homodistil.models.axes import Widths
from homodistil.training.micro_batch import MicroBatchPolicy, micro_batch_sizes, with_micro_batch

RANKS = 2


def make_policy(stage: int = 2, start: int = 3, steps: int = 12, grow: bool = True, **engine) -> MicroBatchPolicy:
    config = RunConfig()
    config.run.grow_micro_batch = grow
    config.train.micro_batch_size, config.train.global_batch_size = start, start * steps * RANKS
    student = Student(small_model(), config.loss)
    return MicroBatchPolicy(
        config, {"zero_optimization": {"stage": stage}, **engine}, student, torch.float32, num_ranks=RANKS
    )


def scaled(widths: Widths, fraction: float) -> dict[str, int]:
    return {axis: max(1, math.floor(width * fraction)) for axis, width in widths.items()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("engine", [{}, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}])
def test_sizes_rise_as_widths_fall_within_the_budget(stage, engine):
    policy = make_policy(stage, **engine)
    sizes = []
    for percent in range(100, 0, -1):
        widths = scaled(policy.start_widths, percent / 100)
        size = policy(widths)
        sizes.append(size)
        assert policy.rank_bytes(widths, size) <= policy.budget_bytes
        larger = [other for other in policy.sizes if other > size]
        assert not larger or policy.rank_bytes(widths, larger[0]) > policy.budget_bytes, "the next would fit, too"
    assert sizes[0] == 3 and sizes == sorted(sizes) and len(set(sizes)) > 1


def test_without_the_option_nothing_grows():
    policy = make_policy(grow=False)
    assert policy(scaled(policy.start_widths, 0.1)) == 3


def test_sizes_depend_on_widths_alone():
    """A resumed run builds its policy anew, and asks it in another order."""
    first, second = make_policy(), make_policy()
    widths = [scaled(first.start_widths, percent / 100) for percent in range(10, 101, 10)]
    assert [first(w) for w in widths] == [second(w) for w in reversed(widths)][::-1]


@given(start=st.integers(1, 64), steps=st.integers(1, 400))
def test_accumulation_steps_divide_all_before_them(start, steps):
    sizes = micro_batch_sizes(start, steps)
    assert sizes[0] == start and sizes[-1] == start * steps and len(set(sizes)) == len(sizes)
    left = [start * steps // size for size in sizes]
    assert all(size * count == start * steps for size, count in zip(sizes, left, strict=True))
    assert all(before % after == 0 for before, after in itertools.pairwise(left))


def test_sizes_of_twelve_steps():
    assert micro_batch_sizes(5, 12) == [5, 10, 20, 60]


def test_parameters_are_counted_at_any_widths():
    """Against a model built at those widths."""
    policy = make_policy()
    widths = {"hidden": 18, **{f"layer.{i}.{axis}": n for i in range(3) for axis, n in (("ffn", 25), ("heads", 3))}}
    widths |= {f"layer.{i}.{axis}": 6 for i in range(3) for axis in ("qk_dim", "vo_dim")}
    narrow = small_model(hidden_size=18, num_attention_heads=3, intermediate_size=25)
    projections = 4 * 18 * 24  # embedding and three layers, student to teacher
    assert policy.parameter_counts(widths) == (sum(p.numel() for p in narrow.parameters()) + projections, 0)


def test_engine_config_of_a_run_that_goes_on():
    start = {"train_batch_size": 48, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 8, "bf16": {}}
    assert with_micro_batch(start, 12, 2) == start | {
        "train_micro_batch_size_per_gpu": 12,
        "gradient_accumulation_steps": 2,
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("rows"), 31)


def sample_set(loaders: list[BatchLoader], consumed: int) -> list[tuple]:
    """What all ranks see in a step: sample, its ids after masking, sorted."""
    seen = []
    for batch in (batch for each in loaders for batch in each.micro_batches(consumed)):
        seen += zip(samples_in(batch), batch.input_ids.tolist(), strict=True)
    return sorted(seen)


@settings(max_examples=25)
@given(world=st.integers(1, 3), steps=st.integers(1, 12), start=st.integers(1, 3), data=st.data())
def test_a_step_sees_the_same_samples_whatever_the_micro_batch(rows, tokenizer, world, steps, start, data):
    total = world * start * steps
    loaders = [loader(rows, tokenizer, world, rank, start, total) for rank in range(world)]
    alone = loader(rows, tokenizer, micro=total, total=total)
    for consumed in range(0, 4 * total, total):
        size = data.draw(st.sampled_from(micro_batch_sizes(start, steps)))
        for each in loaders:
            each.set_micro_batch_size(size)
        assert sample_set(loaders, consumed) == sample_set([alone], consumed)
        assert {len(batch.input_ids) for batch in loaders[0].micro_batches(consumed)} == {size}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_change_neither_uses_nor_loses_what_workers_have_prepared(rows, tokenizer, workers):
    changing = [loader(rows, tokenizer, 2, rank, 2, 16, workers=workers) for rank in range(2)]
    steady = [loader(rows, tokenizer, 2, rank, 2, 16) for rank in range(2)]
    for consumed, size in ((0, 2), (16, 2), (32, 4), (48, 4), (64, 8), (80, 8)):
        for each in changing:
            if size != 2 and consumed in (32, 64):
                each.set_micro_batch_size(size)
        assert sample_set(changing, consumed) == sample_set(steady, consumed)
        assert [len(b.input_ids) for b in changing[1].micro_batches(consumed)] == [size] * (8 // size)


def test_a_size_that_does_not_divide_is_refused(rows, tokenizer):
    with pytest.raises(UserError, match="found 16, allowed are multiples of 6"):
        loader(rows, tokenizer, 2, 0, 2, 16).set_micro_batch_size(3)
