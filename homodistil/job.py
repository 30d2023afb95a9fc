"""The main job: materials -> teacher correction -> distillation -> controls -> result table and report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import torch
from torch import distributed

from homodistil import ranks, stop, watch
from homodistil.config import RunConfig
from homodistil.controls import controls
from homodistil.correction import corrected
from homodistil.distill.compiled import check_student_compile
from homodistil.distill.runtime import check_teacher_runtime
from homodistil.distillation import Distillation, result_row
from homodistil.engine import init_ranks, load_engine_config, resolve_engine_config, teacher_dtype
from homodistil.family import family_rows, read_family
from homodistil.materials import Materials, gather
from homodistil.optimizer import check_implementation
from homodistil.report import write_report
from homodistil.report.family import family_text
from homodistil.results import format_table, write_result
from homodistil.run_folder import check_run_folder, claim_run_folder


def run(config: RunConfig, engine_config_path: Path) -> list[dict]:
    """Everything from raw text to the result table. Every rank calls it; returns the table's rows."""
    raw_engine_config = load_engine_config(engine_config_path)
    device = init_ranks(config.run.rank_timeout_s)
    with stop.on_signals(), watch.watching(config.run.rank_timeout_s):
        rows = _run(config, raw_engine_config, device)
    distributed.destroy_process_group()
    return rows


def _run(config: RunConfig, raw_engine_config: dict, device: torch.device) -> list[dict]:
    engine_config = resolve_engine_config(raw_engine_config, config, ranks.world_size())
    teacher_dtype(config.teacher.dtype, engine_config, device)
    check_implementation(config.optimizer.implementation)
    check_teacher_runtime(config, device)
    check_student_compile(config, engine_config, device)
    folder = Path(ranks.on_first_rank(lambda: str(check_run_folder(config))))
    with watch.long_phase("preparing teacher and data"):
        materials = gather(config, device)
    # Claimed only now: whatever the user had to mend until here, the folder is still free.
    ranks.on_first_rank(lambda: claim_run_folder(folder, config, engine_config))
    materials, correction = corrected(config, engine_config, materials, folder)
    rows = _train_all(config, engine_config, materials, folder, correction)
    ranks.on_first_rank(lambda: _conclude(folder, rows))
    return rows


def _train_all(
    config: RunConfig, engine_config: dict, materials: Materials, folder: Path, correction: dict
) -> list[dict]:
    command = shlex.join([Path(sys.executable).name, *sys.argv])
    main = Distillation(config, engine_config, materials, folder, command)
    student_row = main.run() | {"name": "homodistil"}
    members = ranks.on_first_rank(lambda: read_family(folder))
    teacher = _teacher_row(main, correction) | (ranks.on_first_rank(main.exporter.teacher_speed) if members else {})
    rows = [teacher, *family_rows(student_row, members, config.train.steps)]
    for control in controls(config, members):
        run = Distillation(control.config, engine_config, materials, folder / "compare" / control.name, command)
        rows.append(run.run() | {"name": control.label} | control.facts)
    return rows


def _teacher_row(run: Distillation, correction: dict) -> dict:
    parameters = sum(p.numel() for p in run.teacher.model.parameters())
    row = result_row("teacher", parameters, run.teacher_widths["hidden"], run.evaluate_teacher())
    row |= {name: correction.get(name) for name in ("tokens_per_s_first", "tokens_per_s_last")}
    if correction:
        row["heldout_mlm_loss_before_correction"] = correction["before"]["mlm_loss"]
    return row


def _conclude(folder: Path, rows: list[dict]) -> None:
    path = write_result(folder, rows)
    tables = "\n\n".join(filter(None, (format_table(rows), family_text(rows))))
    print(f"\n{tables}\n\nresult: {path}\nreport: {write_report(folder)}", flush=True)
