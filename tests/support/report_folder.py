"""The folder of a small run, written as a run writes it, for tests of the report."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from homodistil.config.schema import RunConfig
from homodistil.metrics.recorder import Recorder
from homodistil.metrics.result_table import write_result


def widths(hidden: int, ffn: tuple[int, int], head_dim: int) -> dict[str, int]:
    all_widths = {"hidden": hidden}
    for i, size in enumerate(ffn):
        all_widths |= {f"layer.{i}.ffn": size, f"layer.{i}.heads": 3}
        all_widths |= {f"layer.{i}.qk_dim": head_dim, f"layer.{i}.vo_dim": head_dim}
    return all_widths


EVENTS = [
    {
        "step": 20,
        "hash": "0123456789abcdef",
        "widths_before": widths(31, (40, 40), 9),
        "widths_after": widths(29, (36, 32), 9),
        "gap_before": {"kl": 0.51234, "hidden": 0.1, "hidden/layer.0": 0.1},
        "gap_after": {"kl": 0.76543, "hidden": 0.2, "hidden/layer.0": 0.2},
        "milliseconds": 7.53,
        "bytes_moved": 2048,
    },
    {
        "step": 40,
        "hash": "fedcba9876543210",
        "widths_before": widths(29, (36, 32), 9),
        "widths_after": widths(23, (36, 32), 7),
        "gap_before": {"kl": None, "hidden": 0.05},
        "gap_after": {"kl": None, "hidden": 0.15},
        "milliseconds": 8.0,
        "bytes_moved": 3 * 2**20,
    },
]
ROWS = [
    {"name": "teacher", "parameters": 4416698, "hidden_size": 31, "heldout_mlm_loss": 2.3456, "masked_top1": 0.5432},
    {
        "name": "student",
        "parameters": 1104174,
        "hidden_size": 23,
        "heldout_mlm_loss": 2.5,
        "masked_top1": None,
        "kl_to_teacher": 0.3217,
        "tokens_per_s_first": 1000.0,
        "tokens_per_s_last": 2500.0,
    },
]


def log_run(folder: Path, steps: range, start_step: int = 0) -> None:
    with Recorder(folder, total_steps=60, start_step=start_step, enabled=True) as recorder:
        for step in steps:
            values = {
                "loss/total": 9 - step / 10,
                "loss/mlm": 5 - step / 20,
                "loss/hidden/layer.0": 0.1,
                "optim/lr": 1e-3,
            }
            recorder.log_step(step, values | {"speed/tokens_per_s": 1000.0 + step, "speed/mfu": 0.25})
            for event in (e for e in EVENTS if e["step"] == step):
                recorder.log_event(event)
            if step % 30 == 0:
                recorder.log_evaluation(step, {"mlm_loss": 3 - step / 60, "masked_rows": 77.0})


def write_configs(folder: Path, name: str = "quick") -> None:
    config = RunConfig()
    config.run.name, config.train.steps = name, 60
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    (folder / "ds_config.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}, indent=2))


def write_run(folder: Path) -> Path:
    """A finished run of 60 steps with two events. Returns the folder."""
    log_run(folder, range(10, 70, 10))
    write_configs(folder)
    write_result(folder, ROWS)
    return folder
