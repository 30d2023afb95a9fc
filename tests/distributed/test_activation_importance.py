"""pruning.importance=activation on two ranks: they agree, a whole job by it, and the same job resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from distributed.worker_activation import steps_of
from safetensors.torch import load_file
from support.small import small_pair
from support.small_job import TRAIN, arguments, differences, result

from homodistil.pruning.activation_scores import activation_scores

WORKER = Path(__file__).with_name("worker_activation.py")
FIELDS = ("pruning.importance=activation", "pruning.calibration_batches=2", "run.keep_checkpoints=9")
FIELDS += ("run.compare=[one_shot]",)


def test_two_ranks_have_the_scores_of_one_with_all_batches(server, tmp_path):
    server.run(WORKER, [str(tmp_path)], num_ranks=2, timeout_s=100)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    expected = activation_scores(small_pair()[0], steps_of([0, 1]))
    assert len(first) == len(expected) == 13
    for axis, score in expected.items():
        assert torch.equal(first[axis], second[axis])
        # The same squares, summed in fp64 in another order, and rounded.
        torch.testing.assert_close(first[axis], score, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def finished(server, run_inputs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("activation") / "run"
    assert server.start(TRAIN, arguments(run_inputs, folder, *FIELDS)).wait(timeout_s=300) == [0, 0]
    return folder


def test_a_whole_job_and_its_one_shot_control(finished):
    events = [json.loads(line) for line in (finished / "events.jsonl").read_text().splitlines()]
    assert len(events) > 3 and events[-1]["widths_after"]["hidden"] == 12
    rows = {row["name"]: row for row in json.loads((finished / "result.json").read_text())}
    assert rows["homodistil"]["parameters"] == rows["one_shot"]["parameters"]


def test_a_resumed_job_ends_bitwise_the_same(finished, server, run_inputs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    kept = sorted((folder / "checkpoints").glob("step-*"))[1]
    for path in (folder / "checkpoints").glob("step-*"):
        if path > kept:
            shutil.rmtree(path)
    for path in folder.glob("*.json"):
        if path.name in ("result.json", "row.json"):
            path.unlink()
    events = [json.loads(line)["step"] for line in (folder / "events.jsonl").read_text().splitlines()]
    assert min(events) < int(kept.name.split("-")[1]) < max(events)
    job = server.start(TRAIN, arguments(run_inputs, folder, *FIELDS, "run.resume=auto"))
    assert job.wait(timeout_s=300) == [0, 0], job.output()
    assert differences(result(finished), result(folder)) == []
