"""ZeRO stage 3: the same trajectories, sums and refusals as the other stages, and the student outside of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.fork_server import ROOT
from test_job import TRAIN, _arguments
from test_trajectory import (
    OFFLOAD,
    assert_close_to_its_control,
    assert_equals_reference,
    assert_settings_are_as_close_as_without_events,
    assert_settings_equal_plain_training,
    run_cases,
)

FOLDER = Path(__file__).parent

GATHERED = {"stage3_param_persistence_threshold": 0}
FP32 = [
    {"stage": 3, "accumulation": 2},
    {"stage": 3, "zero": {"sub_group_size": 2000, "overlap_comm": True, "stage3_param_persistence_threshold": 500}},
    {"stage": 3, "zero": OFFLOAD | GATHERED},
]
BF16 = [{"stage": 3, "bf16": True}, {"stage": 3, "bf16": True, "events": False}]
MORE_FP32 = [
    {"stage": 3, "zero": GATHERED | {"stage3_prefetch_bucket_size": 3000, "stage3_max_reuse_distance": 2000}},
    {"stage": 3, "zero": {"contiguous_gradients": False, "reduce_scatter": False}},
    {"stage": 3, "zero": {"reduce_scatter": False, "reduce_bucket_size": 5000}, "accumulation": 2},
    {"stage": 3, "zero": OFFLOAD | {"sub_group_size": 3000}, "accumulation": 2, "optimizer": "cpu_adam"},
]
MORE_BF16 = [
    {"stage": 3, "bf16": True, "zero": OFFLOAD | {"sub_group_size": 2000}},
    {"stage": 3, "bf16": True, "zero": {"overlap_comm": True}, "config": {"data_types": {"grad_accum_dtype": "fp32"}}},
]
ALTERED = {
    "share": "ds_tensor.ds_numel of model.bert.embeddings.LayerNorm.weight: found 13, expected 12",
    "aligned": "ds_numel_aligned of model.bert.embeddings.LayerNorm.weight: found 26, expected 24",
    "view": "in fp16_partitioned_groups_flat[0]: not a view of its buffer at element",
    "numel": "fp16_partitioned_groups_flat_numel[0]: found 1,",
    "padding": "groups_padding[0]: found [7,",
    "position": "grad_position of model.bert.embeddings.LayerNorm.weight: found [0, 3,",
    "gradient": "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition of model.bert.embeddings.LayerNorm.weight",
    "frozen": "ds_numel of projections.layer_0.weight: found 577, expected 576",
    "buffer": "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition of",
}


@pytest.fixture(scope="module")
def two_ranks(server) -> list[dict]:
    return run_cases(server, FP32 + BF16, 2)


@pytest.mark.parametrize("i", range(len(FP32)), ids=[json.dumps(case) for case in FP32])
def test_fp32_equals_plain_training(two_ranks, i):
    assert two_ranks[i]["wrapper"] == "DeepSpeedZeroOptimizer_Stage3"
    assert_equals_reference(two_ranks[i])


def test_bf16_is_as_close_as_without_events(two_ranks):
    assert_close_to_its_control(*two_ranks[len(FP32) :])


def test_student_outside_of_training_and_altered_books(server):
    """What holds of the student is asserted inside worker_zero3.py."""
    output = server.run(FOLDER / "worker_zero3.py", [json.dumps([*ALTERED, "nothing"])], 2, timeout_s=300)
    cases = [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("CASE ")]
    messages = {case["name"]: case["message"] for case in cases}
    assert messages.pop("nothing") is None and messages.keys() == ALTERED.keys()
    for name, part in ALTERED.items():
        assert messages[name] is not None, f"{name}: accepted"
        assert part in messages[name] and "install deepspeed==0.19.8" in messages[name], messages[name]


def test_importance_sums_equal_one_process(server):
    cases = [{"stage": 3}, {"stage": 3, "zero": OFFLOAD | GATHERED}]
    output = server.run(FOLDER / "worker_importance.py", [json.dumps(cases)], 2, timeout_s=300)
    results = [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("CASE ")]
    assert len(results) == len(cases)
    for result in results:
        assert result["wrapper"] == "DeepSpeedZeroOptimizer_Stage3"
        assert result["smallest_gradient_norm"] > result["clip"], "clipping has to act, or nothing is shown about it"
        assert result["relative"] < 1e-5, result  # fp32 sums in another order


@pytest.mark.full
def test_more_settings_equal_plain_training(server):
    assert_settings_equal_plain_training(server, MORE_FP32)


@pytest.mark.full
def test_more_bf16_settings_are_as_close_as_without_events(server):
    assert_settings_are_as_close_as_without_events(server, MORE_BF16)


@pytest.mark.full
@pytest.mark.parametrize("num_ranks", [3, 4])
def test_uneven_and_empty_shares(server, num_ranks):
    """On 4 ranks a vector of 5 leaves the last rank without a share of it."""
    for case in run_cases(
        server, [{"stage": 3, "zero": GATHERED}, {"stage": 3, "accumulation": 2, "zero": OFFLOAD}], num_ranks
    ):
        assert_equals_reference(case)


@pytest.mark.full
def test_a_whole_run_follows_that_of_stage_2(server, tmp_path, cache_dir):
    losses = []
    for stage in (2, 3):
        folder = tmp_path / f"stage-{stage}"
        engine_config = str(ROOT / "ds_configs" / f"zero{stage}_fp32.json")
        overrides = ("train.steps=10", "train.eval_every_steps=3", "run.export_milestones=[0.9]")
        arguments = _arguments(folder, cache_dir, *overrides, "--deepspeed", engine_config)
        server.run(TRAIN, arguments, num_ranks=2, timeout_s=500)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss/total"] for line in lines if line["kind"] == "train"])
        assert (folder / "export" / "milestone-0.9" / "model.safetensors").is_file()
        assert len((folder / "events.jsonl").read_text().splitlines()) >= 3
    assert len(losses[0]) == 10
    # fp32 sums in another order.
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
