"""Which corrected teacher a run goes on with: the one that it began with, as long as the cache has it."""

from __future__ import annotations

import json

import pytest

from homodistil.config.command_line import parse
from homodistil.config.derive import SEED_OFFSET, correction_config
from homodistil.data.prepare.corpus import Corpus
from homodistil.engine.build import init_ranks
from homodistil.training.inputs import RunInputs
from homodistil.training.teacher_correction import (
    FACTS_FILE,
    TEACHER_FILE,
    _begun_with,
    _key,
)


@pytest.fixture
def teachers(tmp_path):
    (tmp_path / "teachers" / "abc").mkdir(parents=True)
    (tmp_path / "teachers" / "abc" / FACTS_FILE).write_text("{}")
    return tmp_path / "teachers"


def test_the_recorded_teacher_is_gone_on_with(tmp_path, teachers):
    (tmp_path / TEACHER_FILE).write_text(json.dumps({"corrected": "abc"}))
    assert _begun_with(tmp_path, teachers) == "abc"


@pytest.mark.parametrize("content", [None, "", "[]", '{"corrected": 3}', '{"corrected": "gone"}', '{"corrected": "a'])
def test_anything_else_is_no_record(tmp_path, teachers, content):
    if content is not None:
        (tmp_path / TEACHER_FILE).write_text(content)
    assert _begun_with(tmp_path, teachers) is None


def test_the_seed_of_a_run_has_no_part_in_its_teacher(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    run_inputs = RunInputs(str(tmp_path), None, Corpus([], [], "a fingerprint", "a text"), init_ranks())

    def key(*overrides: str) -> str:
        return _key(parse(["recipe=quickstart", *overrides]), {}, run_inputs)

    assert key() == key("train.seed=1") == key("train.seed=2", "teacher.correction_seed=0")
    assert key() != key("teacher.correction_seed=1") == key("teacher.correction_seed=1", "train.seed=5")
    # What it was when it followed train.seed=0: cached teachers are found again.
    assert key() == "47fd0e26071e57484642"
    assert correction_config(parse(["train.seed=3"])).train.seed == SEED_OFFSET
