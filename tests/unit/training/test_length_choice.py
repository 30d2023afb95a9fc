"""data.seq_len and data.short_steps left open: the teacher's positions, at most 512, and 128 of single texts."""

import pytest
from transformers import BertConfig, LlamaConfig, RobertaConfig

from homodistil.config.command_line import parse
from homodistil.errors import UserError
from homodistil.training.settle import settle

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
}
BERT = BertConfig(**SIZES)
HALF = ("teacher.name=/models/mine", "student.size=0.5")


@pytest.mark.parametrize(
    ("teacher", "fields", "tokens"),
    [
        (BertConfig(**SIZES, max_position_embeddings=100), (), 100),
        (BertConfig(**SIZES), (), 512),
        (RobertaConfig(**SIZES, max_position_embeddings=130), (), 128),  # two of its rows are never used
        (LlamaConfig(**SIZES, max_position_embeddings=8192), (), 512),
        (BertConfig(**SIZES), ("data.task=embedding",), 128),
        (BertConfig(**SIZES, max_position_embeddings=40), ("data.task=embedding",), 40),
        (BertConfig(**SIZES), ("data.seq_len=64",), 64),
        (BertConfig(**SIZES), ("recipe=homobert-small",), 128),
    ],
)
def test_a_length_that_is_left_open(teacher, fields, tokens):
    config = parse([*(() if "recipe" in str(fields) else HALF), *fields])
    assert config.leaves_open("data.seq_len") == (not any("seq_len" in field or "recipe" in field for field in fields))
    settle(config, teacher)
    assert config.data.seq_len == tokens


@pytest.mark.parametrize(
    ("teacher", "fields", "share"),
    [
        (BERT, (), 0.5),
        (BERT, ("data.task=none", "loss.mlm=0", "loss.kl=0"), 0.5),
        (BERT, ("data.short_steps=0.1",), 0.1),
        (BERT, ("data.seq_len=64",), 0.0),
        (BERT, ("data.seq_len=64", "data.short_steps=0.2"), 0.2),
        (BERT, ("data.task=embedding",), 0.0),  # every text has a length of its own
        (LlamaConfig(**SIZES), (), 0.0),  # learns every length from one block
    ],
)
def test_short_steps_that_are_left_open(teacher, fields, share):
    config = parse([*HALF, *fields])
    assert config.leaves_open("data.short_steps") == (not any("seq_len" in f or "short_steps" in f for f in fields))
    settle(config, teacher)
    assert config.data.short_steps == share


@pytest.mark.parametrize(
    ("teacher", "fields", "reason"),
    [
        (BERT, ("data.task=embedding",), "data.task=embedding and data.seq_len=128"),
        (LlamaConfig(**SIZES), (), "data.task=causal and data.seq_len=512"),
        (BERT, ("data.seq_len=15",), "data.task=mlm and data.seq_len=15"),
    ],
)
def test_short_steps_without_effect_are_refused(teacher, fields, reason):
    with pytest.raises(UserError, match=rf"^data.short_steps: found 0.5, allowed is 0 with {reason}; .*short_steps=0$"):
        settle(parse([*HALF, "data.short_steps=0.5", *fields]), teacher)


def test_blocks_that_are_too_short_are_not_split():
    config = parse(list(HALF))
    settle(config, BertConfig(**SIZES, max_position_embeddings=15))
    assert (config.data.seq_len, config.data.short_steps) == (15, 0.0)
