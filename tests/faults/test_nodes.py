"""Several machines, played on one: caches that they share or do not, and rank-0-only work that takes long."""

import pytest
from support.small_job import TRAIN, arguments

from homodistil.distributed.exit_codes import USER_ERROR
from homodistil.distributed.groups import MACHINE

MANY = ("train.steps=2", "pruning.schedule=none", "train.save_every_steps=0", "train.eval_every_steps=0")


@pytest.fixture
def homes(tmp_path):
    """Environment of two ranks on two machines, each with a home of its own."""
    for name in "ab":
        (tmp_path / name).mkdir()
    return {rank: {MACHINE: name, "HOME": str(tmp_path / name)} for rank, name in enumerate("ab")}


def test_who_shares_a_machine_and_who_a_cache(server, homes, tmp_path):
    own = server.start("startup_jobs:group", ["~/cache"], rank_env=homes)
    assert own.wait(timeout_s=60) == [0, 0], own.output()
    assert own.output().count("machines [0, 1] caches [0, 1] left []") == 2, own.output()
    shared = server.start("startup_jobs:group", [str(tmp_path / "cache")], rank_env=homes)
    assert shared.wait(timeout_s=60) == [0, 0], shared.output()
    assert shared.output().count("machines [0, 1] caches [0, 0] left []") == 2, shared.output()


@pytest.mark.full
def test_machines_with_caches_of_their_own_all_get_corpus_and_corrected_teacher(server, run_inputs, homes, tmp_path):
    overrides = ("data.cache_dir=~/cache", "teacher.correction_steps=2", "student.preset=teacher", *MANY)
    fields = [f for f in arguments(run_inputs, tmp_path / "run", *overrides) if not f.startswith("student.h")]
    fields = [f for f in fields if not f.startswith(("student.intermediate", "student.num_att"))]
    job = server.start(TRAIN, fields, rank_env=homes)
    assert job.wait(timeout_s=200) == [0, 0], job.output()
    made = [{str(p.relative_to(tmp_path / n)) for p in (tmp_path / n / "cache").rglob("*.npy")} for n in "ab"]
    assert made[0] == made[1] and len(made[0]) == 2
    teachers = [next((tmp_path / name / "cache" / "teachers").glob("[!.]*")) for name in "ab"]
    for name in ("model.safetensors", "correction.json", "config.json"):
        assert (teachers[0] / name).read_bytes() == (teachers[1] / name).read_bytes()
    assert teachers[0].name == teachers[1].name and not list(teachers[1].parent.glob(".*"))


@pytest.mark.parametrize("how, codes", [("once", [0, 0]), ("in a collective", None)])
def test_work_of_one_rank_may_take_longer_than_a_collective(server, how, codes):
    job = server.start("startup_jobs:prepare_slowly", [how, 6])
    found = job.wait(timeout_s=90)
    assert (found == codes) if codes else any(found), job.output()
    assert job.output().count("has made") == (2 if codes else 0), job.output()


def test_a_mistake_on_one_machine_ends_all_with_its_line(server, homes):
    job = server.start("startup_jobs:fail_on_one_machine", [], rank_env=homes)
    assert job.wait(timeout_s=60) == [USER_ERROR, USER_ERROR], job.output()
    assert job.output().count("error: data.cache_dir: full on rank 1's machine; free it") == 1, job.output()
