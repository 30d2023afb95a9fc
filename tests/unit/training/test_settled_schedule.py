"""pruning.schedule=auto: at once where a cut is compensated, gradually where it is not or where the config says so."""

import pytest
from transformers import BertConfig, LlamaConfig

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
TEACHER = BertConfig(**SIZES)
HALF = ("teacher.name=/models/mine", "student.size=0.5")


def _settled(*fields: str):
    config = parse([*HALF, *fields])
    settle(config, TEACHER)
    return config


@pytest.mark.parametrize(
    ("fields", "schedule"),
    [
        ((), "one_shot"),
        (("pruning.compensation=refit", "pruning.one_shot_stages=2"), "one_shot"),
        (("pruning.compensation=none",), "cubic"),
        (("pruning.end_fraction=0.3",), "cubic"),
        (("pruning.interval_steps=5",), "cubic"),  # its default, but somebody wants it
        (("pruning.max_event_fraction=0.25",), "cubic"),
        (("pruning={start_fraction: 0.1, end_fraction: 0.2}",), "cubic"),
        (("run.export_milestones=[0.75]",), "cubic"),
        (("run.compare=[one_shot]",), "cubic"),
        (("run.compare=[plain_one_shot]",), "one_shot"),
        (("pruning.schedule=linear", "pruning.compensation=none"), "linear"),
        (("pruning.schedule=none",), "none"),
    ],
)
def test_auto_is_what_the_config_says(fields, schedule):
    assert _settled(*fields).pruning.schedule == schedule


@pytest.mark.parametrize(
    ("fields", "sequences"),
    [
        ((), 512),
        (("pruning.schedule=one_shot",), 512),
        (
            ("pruning.schedule=one_shot", "pruning.compensation_sequences=128"),
            128,
        ),  # its default, but somebody wants it
        (("pruning.schedule=cubic",), 128),
        (("pruning.end_fraction=0.3",), 128),
        (("pruning.schedule=none",), 128),
    ],
)
def test_a_cut_at_once_is_fitted_to_more_text(fields, sequences):
    assert _settled(*fields).pruning.compensation_sequences == sequences


def test_the_number_is_open_until_the_schedule_is_known():
    name = "pruning.compensation_sequences"
    for fields, is_open in (((), True), (("pruning.schedule=cubic",), False), ((f"{name}=128",), False)):
        assert parse([*HALF, "data.task=mlm", *fields]).leaves_open(name) == is_open


def test_a_random_student_is_not_cut():
    assert _settled("student.init=random").pruning.schedule == "none"


def test_stages_of_a_cut_that_turns_out_to_be_gradual_are_refused():
    with pytest.raises(UserError, match=r"pruning.one_shot_stages: found 2, allowed is 1 unless .*found cubic"):
        _settled("pruning.one_shot_stages=2", "pruning.end_fraction=0.3")


def test_a_setting_of_the_file_of_another_run_counts(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("pruning: {end_fraction: 0.5}\n")
    assert _settled(f"--config={path}").pruning.schedule == "cubic"


def test_decoders_have_the_ridge_of_each_linear_chosen():
    """Unless somebody wants another, which may be the default of encoders."""
    decoder = LlamaConfig(**SIZES, num_key_value_heads=2)
    for fields, of, ridge in (
        ((), decoder, None),
        (("pruning.compensation_ridge=0.01",), decoder, 0.01),
        (("pruning.compensation_ridge=0.5",), decoder, 0.5),
        (("pruning.schedule=none",), decoder, None),
        (("pruning.schedule=cubic",), decoder, None),
        (("pruning.depth_schedule=linear", "student.num_hidden_layers=1"), decoder, None),
        ((), TEACHER, 0.01),
        (("pruning.compensation_ridge=null",), TEACHER, None),
    ):
        config = parse([*HALF, *fields])
        settle(config, of)
        assert config.pruning.compensation_ridge == ridge, (fields, type(of))
    assert parse(HALF).leaves_open("pruning.compensation_ridge")
    assert not parse([*HALF, "data.task=mlm"]).leaves_open("pruning.compensation_ridge")


@pytest.mark.parametrize(
    ("fields", "compensation"),
    [
        (("student.preset=teacher", "data.task=embedding"), "none"),
        (("student.preset=teacher", "data.task=embedding", "pruning.compensation=refit"), "refit"),
        (("student.preset=teacher", "data.task=embedding", "student.intermediate_size=40"), "full"),
        (("student.size=0.5", "data.task=embedding"), "full"),
        (("student.size=0.5", "data.task=embedding", "pruning.schedule=none"), "none"),  # no width falls
        (("student.preset=teacher",), "full"),
    ],
)
def test_embedders_that_only_lose_layers_keep_the_others_as_they_are(fields, compensation):
    config = parse(["teacher.name=/models/mine", "student.num_hidden_layers=1", *fields])
    settle(config, TEACHER)
    assert config.pruning.compensation == compensation
