"""Which corrected teacher a run goes on with: the one that it began with, as long as the cache has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.small_job import arguments

from homodistil.config.command_line import parse
from homodistil.config.derive import SEED_OFFSET, correction_config
from homodistil.data.prepare.corpus import Corpus
from homodistil.engine.build import init_ranks, resolve_engine_config
from homodistil.training.inputs import RunInputs, prepare_inputs
from homodistil.training.teacher_correction import (
    FACTS_FILE,
    TEACHER_FILE,
    _begun_with,
    _key,
    corrected,
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


@pytest.mark.process
def test_runs_of_two_seeds_share_one_corrected_teacher(run_inputs, tmp_path):
    """The second takes the first one's from the cache; `correction_seed` makes another."""

    def teacher_of(name: str, *overrides: str) -> Path:
        fields = arguments(run_inputs, tmp_path / name, f"data.cache_dir={tmp_path / 'cache'}", *overrides)[4:]
        config = parse(["recipe=quickstart", "teacher.correction_steps=2", *fields])
        engine_config = resolve_engine_config({"zero_optimization": {"stage": 2}}, config.train, 1)
        (tmp_path / name).mkdir()
        return Path(corrected(config, engine_config, prepare_inputs(config, init_ranks()), tmp_path / name)[0].teacher)

    first = teacher_of("first", "train.seed=0")
    made_at = (first / FACTS_FILE).stat().st_mtime_ns
    assert teacher_of("second", "train.seed=1") == first and (first / FACTS_FILE).stat().st_mtime_ns == made_at
    third = teacher_of("third", "train.seed=0", "teacher.correction_seed=1")
    assert sorted(first.parent.iterdir()) == sorted([first, third])
    weights = [load_file(folder / "model.safetensors") for folder in (first, third)]
    assert any(not weight.equal(weights[1][name]) for name, weight in weights[0].items())
