"""train.lr left open: by the width that the student ends with, a quarter of it for decoders and heads of labels."""

import pytest
from transformers import BertConfig, LlamaConfig

from homodistil.config.command_line import parse
from homodistil.training.resolve import resolve_run
from homodistil.training.run_summary import run_summary
from homodistil.training.settle import settle

BERT = BertConfig(num_hidden_layers=2, hidden_size=128, intermediate_size=512, num_attention_heads=2)
LLAMA = LlamaConfig(
    num_hidden_layers=2,
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=99,
)
HALF = (
    "teacher.name=/models/mine",
    "student.hidden_size=64",
    "student.intermediate_size=128",
    "student.num_attention_heads=2",
)


@pytest.mark.parametrize(
    ("teacher", "fields", "rate"),
    [
        (BERT, HALF, 3e-3),
        (BERT, (*HALF, "student.hidden_size=32"), 6e-3),
        (BERT, (*HALF, "pruning.schedule=none"), 1.5e-3),  # nothing is cut
        (BERT, (*HALF, "pruning.schedule=none", "student.init=random"), 3e-3),
        (BERT, (*HALF, "train.lr=1e-4"), 1e-4),
        (BERT, ("recipe=quickstart", "student.hidden_size=32"), 3e-3),  # the recipe's
        (BERT, (*HALF, "data.task=scores"), 7.5e-4),
        (LLAMA, (*HALF, "student.num_attention_heads=4", "student.head_dim=16"), 7.5e-4),
    ],
)
def test_the_rate_is_that_of_the_last_width(teacher, fields, rate):
    resolved = resolve_run(parse(list(fields)), teacher)
    assert resolved.learning_rate == rate
    is_open = not any("lr=" in field or "recipe=" in field for field in fields)
    shown = run_summary(resolved)["learning rate"]
    assert shown.startswith(f"{rate:g} at its peak") and (", for a hidden size of" in shown) == is_open


def test_it_is_open_until_the_teacher_is_known():
    assert parse(list(HALF)).leaves_open("train.lr")
    assert not parse([*HALF, "train.lr=3e-3"]).leaves_open("train.lr")


@pytest.mark.parametrize(
    ("teacher", "fields", "rate"),
    [
        (BERT, ("teacher.correction_steps=10",), 1.5e-3),
        (BERT, ("teacher.correction_steps=10", "teacher.correction_lr=1e-3"), 1e-3),
        (BERT, (), 1e-3),  # none is made
        (LLAMA, ("teacher.correction_steps=10",), 3.8e-4),
    ],
)
def test_the_rate_of_the_correction_is_by_the_teachers_width(teacher, fields, rate):
    config = parse([*HALF, *fields])
    for _ in range(2):  # a job settles a config more than once
        settle(config, teacher)
        assert config.teacher.correction_lr == rate
