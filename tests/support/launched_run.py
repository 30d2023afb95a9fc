"""One small run of a family through the launcher's own script on two ranks: its command line, its files, its resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from support.fork_server import ROOT, ForkServer

TRAIN = ROOT / "launcher" / "train.py"
STEPS, SAVE_EVERY = 10, 4


def arguments(materials: Path, run_dir: Path, stage: int, student: dict[str, int], *overrides: str) -> list[str]:
    """The command line.

    Args:
        materials: folder with `teacher` and `text`.
        stage: of ZeRO.
        student: fields of student.
    """
    fields = {
        "teacher.name": materials / "teacher",
        "data.sources": f"[{materials / 'text'}]",
        "data.cache_dir": materials / "cache",
        "data.seq_len": 32,
        **{f"student.{name}": size for name, size in student.items()},
        "train.steps": STEPS,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 2,
        "train.save_every_steps": SAVE_EVERY,
        "train.eval_every_steps": 5,
        "train.log_every_steps": 1,
        "pruning.end_fraction": 0.8,
        "pruning.interval_steps": 2,
        "loss.kl": 1.0,
        "run.dir": run_dir,
        "run.keep_checkpoints": 9,
        "run.compare": "[]",
        "run.report": "false",
    }
    values = [f"{name}={value}" for name, value in fields.items()]
    return ["--deepspeed", str(ROOT / "ds_configs" / f"zero{stage}_fp32.json"), *values, *overrides]


def run(server: ForkServer, command: list[str]) -> str:
    """What rank 0 prints, once both have ended well."""
    job = server.start(TRAIN, command)
    assert job.wait(timeout_s=300) == [0, 0], job.output()
    return job.output(0)


class StageRuns(dict[int, Path]):
    """ZeRO stage -> finished run folder. A run is made when a test first asks for it: some stages `make test-full` asks
    for alone."""

    def __init__(self, run_stage: Callable[[int], Path]) -> None:
        self._run_stage = run_stage

    def __missing__(self, stage: int) -> Path:
        self[stage] = self._run_stage(stage)
        return self[stage]


def lines(path: Path) -> list[dict]:
    """Of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_stages_agree(two: Path, three: Path) -> None:
    """The same losses under ZeRO-2 and ZeRO-3, which begin with the teacher itself."""
    of_two, of_three = ([e for e in lines(run / "metrics.jsonl") if "loss/total" in e] for run in (two, three))
    assert len(of_two) == STEPS
    assert of_two[0]["loss/kl"] == of_two[0]["loss/attention"] == of_two[0]["loss/hidden"] == 0
    for a, b in zip(of_two, of_three, strict=True):
        # The same sums in another order: fp32.
        assert abs(a["loss/total"] - b["loss/total"]) <= 1e-3 * b["loss/total"], a["step"]


def without_end(finished: Path, copy: Path) -> Path:
    """A copy of a finished run, as it was behind its first checkpoint."""
    shutil.copytree(finished, copy)
    for leftover in (f"checkpoints/step-{STEPS:06d}", f"checkpoints/step-{2 * SAVE_EVERY:06d}", "export"):
        shutil.rmtree(copy / leftover)
    (copy / "row.json").unlink()
    (copy / "checkpoints" / "latest").write_text(f"step-{SAVE_EVERY:06d}\n")
    return copy


def same_export(ours: Path, theirs: Path) -> bool:
    """Whether the exports of two runs are bitwise the same."""
    a, b = (load_file(path / "export" / "model.safetensors") for path in (ours, theirs))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
