"""Checkpoints are read by any number of ranks and any ZeRO stage, after resize events; what goes on is the same run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.fork_server import ForkServer

WORKER = Path(__file__).with_name("worker_elastic.py")


def run_cases(server: ForkServer, folder: Path, num_ranks: int, cases: list[dict]) -> list[dict]:
    output = server.run(WORKER, [str(folder), json.dumps(cases)], num_ranks, timeout_s=400)
    return [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("CASE ")]


def assert_same_run(case: dict) -> None:
    """Weights and moments arrive bitwise; then sums over ranks and micro-batches are taken in another order."""
    assert all(value == 0 for value in case["restored"].values()), case
    assert case["loss"] <= 1e-5, case
    assert case["final_weight"] < 1e-6, case  # a thousandth of one step of the learning rate


@pytest.fixture(scope="module")
def two_ranks(server, tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("elastic")
    cases = [
        {"do": "write", "run": "stage2", "stage": 2},
        {"do": "resume", "run": "stage2", "stage": 2},
        {"do": "resume", "run": "stage2", "stage": 0, "accumulation": 2},
        {"do": "write", "run": "async", "stage": 2, "async": True},
        {"do": "faults", "run": "faults", "stage": 1},
    ]
    return folder, run_cases(server, folder, 2, cases)


def test_the_same_layout_goes_on_bitwise(two_ranks):
    case = two_ranks[1][1]
    assert case["loss"] == 0, case
    assert all(case[f"final_{kind}"] == 0 for kind in ("weight", "exp_avg", "exp_avg_sq")), case


def test_another_stage_and_accumulation_goes_on(two_ranks):
    case = two_ranks[1][2]
    assert case["wrapper"] == "AdamW"
    assert_same_run(case)


def test_fewer_ranks_of_another_stage_go_on(server, two_ranks):
    (case,) = run_cases(server, two_ranks[0], 1, [{"do": "resume", "run": "stage2", "stage": 1, "accumulation": 2}])
    assert case["wrapper"] == "DeepSpeedZeroOptimizer"
    assert_same_run(case)


def test_writing_beside_training_changes_nothing_and_stalls_it_less_than_a_step(two_ranks):
    folder, (sync, *_, background, _) = two_ranks
    assert background["losses"] == sync["losses"]
    assert background["save_s"] <= background["step_s"], background
    print(f"stall {background['save_s']:.4f} s, step {background['step_s']:.4f} s")
    manifests = [folder / run / "checkpoints" / "step-000006" / "manifest.json" for run in ("stage2", "async")]
    sync, background = (json.loads(path.read_text())["files"] for path in manifests)
    tensors = [name for name in sync if name.endswith(".safetensors")]
    assert len(tensors) == 5 and all(sync[name] == background[name] for name in tensors)


def test_a_full_disk_is_reported_on_every_rank(two_ranks):
    messages = two_ranks[1][-1]["messages"]
    assert len(messages) == 2 and messages[0] == messages[1] and len(messages[0]) == 2
    for message, step in zip(messages[0], (2, 3), strict=True):
        file = f"checkpoints/.step-{step:06d}.part/state-00001-of-00002.safetensors"
        assert message.startswith("checkpoint: rank 1 cannot write /") and "\n" not in message
        assert f"{file}: File too large; free disk space" in message


STAGES = (1, 2, 3)


@pytest.mark.full
@pytest.mark.parametrize("written_by, read_by", [(2, 1), (1, 2), (2, 4), (2, 2)])
def test_matrix(server, tmp_path_factory, written_by, read_by):
    """Every stage to every stage, in fp32, across a change of ranks, three events in and three to come."""
    folder = tmp_path_factory.getbasetemp() / f"written-by-{written_by}"
    if not folder.exists():
        folder.mkdir()
        run_cases(
            server, folder, written_by, [{"do": "write", "run": f"stage{stage}", "stage": stage} for stage in STAGES]
        )
    pairs = [(old, new) for old in STAGES for new in (0, *STAGES)]
    found = run_cases(
        server, folder, read_by, [{"do": "resume", "run": f"stage{old}", "stage": new} for old, new in pairs]
    )
    assert len(found) == len(pairs)
    for case in found:
        assert_same_run(case)
