"""A micro-batch that grows at events changes nothing but the order of sums: on real engines and in whole runs.

That every step of a growing engine is one step, over one global batch, is asserted inside worker_micro_batch.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.fork_server import ForkServer
from support.small_job import make_materials

WORKER = Path(__file__).with_name("worker_micro_batch.py")

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
BF16 = {"bf16": {"enabled": True}}
FP32_CASES = [{"stage": 2, "zero": {"overlap_comm": True}}, {"stage": 3}]
MORE_FP32 = [{"stage": 0}, {"stage": 1}, {"stage": 2, "zero": OFFLOAD}]
SUMS_IN_FP32 = BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}
BF16_CASES = [{"stage": 1, "engine": SUMS_IN_FP32}]
MORE_BF16 = [{"stage": 0, "engine": BF16}, {"stage": 2, "engine": BF16}]


def run_cases(server: ForkServer, cases: list[dict], *folder: str) -> list[dict]:
    output = server.run(WORKER, [json.dumps(cases), *folder], num_ranks=2, timeout_s=400)
    return [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("CASE ")]


@pytest.fixture(scope="module")
def done(server, tmp_path_factory) -> tuple[list[dict], Path]:
    """The teacher has many words: most of what an event frees is theirs, as with a real one."""
    folder = tmp_path_factory.mktemp("runs")
    make_materials(folder, hidden_size=64, vocab_size=6000)
    return run_cases(server, FP32_CASES + BF16_CASES, str(folder)), folder


def assert_ends_alike(case: dict) -> None:
    # fp32 sums in another order, over 6 steps with 3 resizes: 1/1000 of one step of the learning rate.
    assert case["weight"] < 1e-6, case
    assert case["loss"] < 5e-6, case  # ten fp32 roundings of a loss near 4.5


def assert_differs_by_rounding(case: dict) -> None:
    # Gradients are rounded to bf16 (2^-9) once a micro-batch. 1e-4 and 1e-3 are 1/10 and all of one step of the
    # learning rate; a micro-batch lost or counted twice moves weights by many steps.
    assert case["weight_mean"] < 1e-4 and case["weight"] < 1e-3, case


@pytest.mark.parametrize("i", range(len(FP32_CASES)), ids=map(json.dumps, FP32_CASES))
def test_fp32_engine_ends_where_one_that_does_not_grow_ends(done, i):
    assert_ends_alike(done[0][i])


@pytest.mark.parametrize("i", range(len(BF16_CASES)), ids=map(json.dumps, BF16_CASES))
def test_bf16_engine_differs_by_the_rounding_of_gradients(done, i):
    assert_differs_by_rounding(done[0][len(FP32_CASES) + i])


def test_predicted_state_is_what_an_engine_holds(done):
    for case in done[0]:
        if case["stage"] == 3:
            continue  # keeps parameters as small as these whole on every rank
        # Padding of partitions, and one count a parameter.
        assert case["predicted_bytes"] == pytest.approx(case["held_bytes"], rel=0.005), case


@pytest.mark.full
def test_more_engines_end_alike(server):
    cases = run_cases(server, MORE_FP32 + MORE_BF16)
    for case in cases[: len(MORE_FP32)]:
        assert_ends_alike(case)
    for case in cases[len(MORE_FP32) :]:
        assert_differs_by_rounding(case)


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def steps(folder: Path) -> list[dict]:
    return [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "train"]


def test_events_and_metrics_tell_the_growth(done):
    _, folder = done
    grown, steady = steps(folder / "grown"), steps(folder / "steady")
    sizes = [line["train/micro_batch_size"] for line in grown]
    assert sizes[0] == 1 and sizes == sorted(sizes) and sizes[-1] == 8
    assert {line["train/micro_batch_size"] for line in steady} == {1}
    for event in lines(folder / "grown", "events.jsonl"):
        for moment, step in (("before", event["step"]), ("after", event["step"] + 1)):
            size, parts = event[f"micro_batch_size_{moment}"], event[f"gradient_accumulation_steps_{moment}"]
            assert size * parts == 8 and size == sizes[step - 1]
    assert not any("micro_batch_size_after" in event for event in lines(folder / "steady", "events.jsonl"))


def test_a_run_that_grows_follows_the_path_of_one_that_does_not(done):
    _, folder = done
    grown, steady = steps(folder / "grown"), steps(folder / "steady")
    assert len(grown) == len(steady) == 7
    for ours, theirs in zip(grown, steady, strict=True):
        assert ours["widths/hidden"] == theirs["widths/hidden"]
        for name in ("loss/total", "loss/mlm", "loss/kl", "loss/hidden", "loss/attention", "optim/grad_norm"):
            # fp32 sums in another order; the KL is one dot product over rows x vocabulary (1e5 terms).
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
        # FLOPs a token: counts of tokens and masked rows, without the time that was measured.
        ratios = [line["speed/model_tflops"] / line["speed/tokens_per_s"] for line in (ours, theirs)]
        assert ratios[0] == pytest.approx(ratios[1], rel=1e-9)
    ours, theirs = (load_file(folder / name / "export" / "model.safetensors") for name in ("grown", "steady"))
    assert ours.keys() == theirs.keys()
    # 1/1000 of one step of the learning rate.
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-6


def test_resuming_finds_the_micro_batch_again(done):
    """From a checkpoint after the growth, with a loader worker: bitwise the uninterrupted run."""
    _, folder = done
    ours, theirs = (load_file(folder / name / "export" / "model.safetensors") for name in ("resumed", "grown"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("loss/total", "train/micro_batch_size", "widths/hidden"):
        assert [line[name] for line in steps(folder / "resumed")] == [line[name] for line in steps(folder / "grown")]
