"""Shipped sets of students for `--teachers-once`."""

from pathlib import Path

import pytest

from homodistil.config.command_line import parse_job
from homodistil.config.shipped import student_set_names
from homodistil.config.students import file_names
from homodistil.errors import UserError

ENGINE = ("--deepspeed", "zero2_fp32", "recipe=quickstart", "run.compare=[]")


@pytest.mark.parametrize("name", student_set_names())
def test_a_shipped_set_is_a_job_of_its_students(name, tmp_path):
    job = parse_job([*ENGINE, f"run.dir={tmp_path}", "--teachers-once", name])
    assert [config.run.dir for config in job.students] == [
        str(tmp_path / "students" / path.stem) for path in file_names(name)
    ]
    widths = [config.student.hidden_size for config in job.students]
    assert len(widths) > 1 and widths == sorted(widths, reverse=True)


def test_the_family_is_cut_at_once_at_the_sizes_of_the_milestones():
    job = parse_job([*ENGINE, "--teachers-once", "family"])
    shares = parse_job(["recipe=family"]).config.run.export_milestones
    assert [config.student.hidden_size for config in job.students] == [int(128 * share) for share in shares]
    assert {config.pruning.schedule for config in job.students} == {"one_shot"}


def test_a_file_of_this_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(file_names("family")) == 3
    Path("family").write_text("student: {hidden_size: 64}\n")
    assert file_names("family,other.yaml") == [Path("family"), Path("other.yaml")]


def test_what_is_allowed_is_named():
    with pytest.raises(UserError, match=r"--teachers-once: found no file.*shipped set \(family\)"):
        file_names(" , ")
    with pytest.raises(UserError, match="--teachers-once.*familly"):
        parse_job([*ENGINE, "--teachers-once", "familly"])
