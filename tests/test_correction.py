"""Which corrected teacher a run goes on with: the one that it began with, as long as the cache has it."""

from __future__ import annotations

import json

import pytest

from homodistil.correction import FACTS_FILE, TEACHER_FILE, _begun_with


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
