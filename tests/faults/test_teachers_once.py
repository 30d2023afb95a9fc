"""Several students in one job: each ends bitwise where a job of its own does, whatever happens on the way."""

import json
import re

import pytest
from support.small_job import SAVE_EVERY, STEPS, TRAIN, arguments, differences, result

from homodistil.distributed.exit_codes import STOPPED, USER_ERROR

STUDENTS = {
    "half": "student: {hidden_size: 12, intermediate_size: 20}\n",
    "wide": "student: {hidden_size: 16, intermediate_size: 24}\npruning: {schedule: linear, compensation: refit}\n"
    "train: {lr: 2.0e-3}\nrun: {export_milestones: [0.83], settle_steps: 1}\n",
}
OWN_FIELDS = {
    "half": (),
    "wide": (
        "student.hidden_size=16",
        "student.intermediate_size=24",
        "pruning.schedule=linear",
        "pruning.compensation=refit",
        "train.lr=2e-3",
        "run.export_milestones=[0.83]",
        "run.settle_steps=1",
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What --teachers-once is given."""
    folder = tmp_path_factory.mktemp("students")
    for name, text in STUDENTS.items():
        (folder / f"{name}.yaml").write_text(text)
    return ",".join(str(folder / f"{name}.yaml") for name in STUDENTS)


@pytest.fixture(scope="module")
def alone(server, run_inputs, tmp_path_factory):
    """Name -> run folder of a job of its own."""
    folder = tmp_path_factory.mktemp("alone")
    for name, fields in OWN_FIELDS.items():
        job = server.start(TRAIN, arguments(run_inputs, folder / name, "teacher.lock_step=false", *fields))
        assert job.wait(timeout_s=180) == [0, 0], job.output()
    return {name: folder / name for name in STUDENTS}


def _own(run_inputs, folder, files, *overrides) -> list[str]:
    return [*arguments(run_inputs, folder, *overrides), "--teachers-once", files]


def _differences(folder, alone) -> dict[str, list[str]]:
    """By student; names in the table apart."""
    found = {}
    for name in STUDENTS:
        ours, theirs = result(folder / "students" / name), result(alone[name])
        for row in ours["result.json"]:
            row["name"] = row["name"].replace(name, "homodistil")
        for rows in (ours["result.json"], theirs["result.json"]):
            for row in rows:
                for measured in ("inference_latency_ms", "inference_tokens_per_s"):
                    row.pop(measured, None)
        found[name] = differences(ours, theirs)
    return found


def test_each_student_is_bitwise_that_of_a_job_of_its_own(server, run_inputs, alone, files, tmp_path):
    folder = tmp_path / "run"
    job = server.start(TRAIN, _own(run_inputs, folder, files, "run.report=true"))
    assert job.wait(timeout_s=180) == [0, 0], job.output()
    assert _differences(folder, alone) == {"half": [], "wide": []}
    for name in STUDENTS:
        assert (folder / "students" / name / "report.html").is_file()
        assert len([key for key in result(alone[name]) if "checkpoints" in str(key)]) > 20
    rows = json.loads((folder / "result.json").read_text())
    assert [row["name"] for row in rows] == ["teacher", "half", "wide @ 0.83", "wide"]
    passes = json.loads((folder / "teachers_once.json").read_text())
    # Two micro-batches a rank and step; each pass is used by both.
    assert (passes["num_passes"], passes["num_uses"]) == (2 * STEPS, 4 * STEPS) and passes["teacher_s"] > 0


@pytest.mark.full
def test_killed_between_two_checkpoints_then_stopped_they_end_level(server, run_inputs, alone, files, tmp_path):
    folder = tmp_path / "run"
    own = _own(run_inputs, folder, files, "run.resume=auto")
    # The fourth checkpoint is the second of the second student: the first one is ahead of it.
    job = server.start(TRAIN, own, env={"HOMODISTIL_FAULT": "checkpoint.before_rename:hit=4:action=kill"})
    assert job.wait(timeout_s=180)[0] == -9, job.output()  # rank 1 learns of it from the watch
    latest = [(folder / "students" / name / "checkpoints" / "latest").read_text().strip() for name in STUDENTS]
    assert latest == [f"step-{2 * SAVE_EVERY:06d}", f"step-{SAVE_EVERY:06d}"]
    job = server.start(TRAIN, own, env={"HOMODISTIL_FAULT": "train.step:rank=1:hit=5:action=term"})
    assert job.wait(timeout_s=180) == [STOPPED, STOPPED], job.output()
    assert "stopped by SIGTERM at step half 9 of 10, wide 9 of 10" in job.output(), job.output()
    job = server.start(TRAIN, own)
    assert job.wait(timeout_s=180) == [0, 0], job.output()
    assert _differences(folder, alone) == {"half": [], "wide": []}


@pytest.mark.parametrize(
    "text, overrides, message",
    [
        (
            "train: {global_batch_size: 16}",
            (),
            "train.global_batch_size: 16 in odd.yaml .--teachers-once., and the job",
        ),
        ("student: {hiden_size: 16}", (), "student.hiden_size: unknown field in .*odd.yaml.*hidden_size"),
        ("student: {hidden_size: 99}", (), "student.hidden_size: found 99, the teacher has 24"),
        ("{}", ("run.grow_micro_batch=true",), "run.grow_micro_batch: found true, .* allowed with --teachers-once is"),
    ],
    ids=["shared field", "unknown field", "impossible student", "growing micro-batches"],
)
def test_what_students_cannot_have_is_refused_before_anything_is_written(
    server, run_inputs, tmp_path, text, overrides, message
):
    (tmp_path / "odd.yaml").write_text(text)
    folder = tmp_path / "run"
    job = server.start(TRAIN, _own(run_inputs, folder, str(tmp_path / "odd.yaml"), *overrides), num_ranks=1)
    assert job.wait(timeout_s=180) == [USER_ERROR], job.output()
    assert re.search(f"error: {message}", job.output()), job.output()
    assert not folder.exists()
