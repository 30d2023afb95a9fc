"""The main job: materials -> teacher correction -> distillation -> controls -> result table and report."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from homodistil.config.command_line import Job
from homodistil.config.plugins import load_plugins
from homodistil.config.schema import DataConfig, RunFolderConfig
from homodistil.config.students import check_stage
from homodistil.distill.teacher import load_config
from homodistil.distill.teacher_sharding import num_parameters
from homodistil.distributed import graceful_stop, groups, invocation, rank_log, ranks, watchdog
from homodistil.distributed.fault_injection import fault_point
from homodistil.engine.build import init_ranks, load_engine_config, resolve_engine_config
from homodistil.engine.ds_config import teacher_dtype, zero_stage
from homodistil.export.model_card import complete_cards
from homodistil.metrics.progress import doing
from homodistil.metrics.result_table import format_table, write_result
from homodistil.planning.save_plan import calibration_path, keep_plan
from homodistil.training.control_runs import controls
from homodistil.training.final_formats import add_formats
from homodistil.training.inputs import prepare_inputs
from homodistil.training.label_checks import check_ground_truth
from homodistil.training.milestone_exports import family_rows, read_family
from homodistil.training.multi_student import student_runs, train_together
from homodistil.training.resolve import resolve_run
from homodistil.training.run import DistillationRun, result_row
from homodistil.training.run_folder import check_run_folders, claim_run_folder
from homodistil.training.settings import settings_checks
from homodistil.training.startup_report import StartReport
from homodistil.training.stored_outputs import with_stored_outputs
from homodistil.training.teacher_checks import check_teacher
from homodistil.training.teacher_correction import corrected


def run(job: Job) -> list[dict]:
    """Everything from raw text to the result table. Every rank calls it; returns the table's rows.

    The ranks stay joined, so that this process may call it again.
    """
    report, timeout_s = StartReport(), job.config.run.rank_timeout_s
    raw_engine_config = load_engine_config(job.engine_config)
    with report.part("joining"), doing("waiting for all ranks"):
        device = init_ranks(timeout_s)
    with (
        graceful_stop.on_signals(f"run it again with run.resume=auto to go on{graceful_stop.go_on_with()}"),
        watchdog.watching(timeout_s),
    ):
        return _run(job, raw_engine_config, device, report)


def _run(job: Job, raw_engine_config: dict, device: torch.device, report: StartReport) -> list[dict]:
    config, students = job.config, job.students
    engine_config = resolve_engine_config(raw_engine_config, config.train, ranks.world_size())
    for one in (config, *students):
        load_plugins(one.teacher.plugins, "teacher.plugins")
        for check in settings_checks(one, engine_config, device):
            check()
    if students:
        check_stage(zero_stage(engine_config))
    folder, *own_folders = ranks.on_rank_zero(lambda: check_run_folders(config, students))
    what = "preparing teacher and data"
    with watchdog.long_phase(what), report.part("teacher and data"), doing(what):
        for student in students:
            check_teacher(student)
        fault_point("start.materials")
        run_inputs = prepare_inputs(config, device, own_folders or [folder], students)
        check_ground_truth(config, run_inputs, teacher_dtype(config.teacher.dtype, engine_config, device))
    ranks.on_rank_zero(lambda: check_run_folders(config, students))  # again: what was `auto` is known now
    # Claimed only now: whatever the user had to fix until here, the folder is still free.
    for path, one in zip((folder, *own_folders), (config, *students), strict=True):
        ranks.on_rank_zero(lambda path=path, one=one: claim_run_folder(path, one, engine_config))
    num_machines = len(set(groups.machine_groups()))
    if not students:
        teacher_config = load_config(run_inputs.teacher) if run_inputs.vocabulary else None
        subject = (
            functools.partial(resolve_run, config, teacher_config),
            calibration_path(config.data),
            raw_engine_config,
        )
        sizes = ranks.world_size(), num_machines
        ranks.on_rank_zero(lambda: keep_plan(Path(folder), *subject, *sizes))
    if config.run.rank_logs:
        rank_log.keep_in(Path(folder) / "logs")
    with report.part("teacher's correction"):
        run_inputs, correction = corrected(config, engine_config, run_inputs, folder)
    if config.teacher.is_stored:
        with report.part("teacher's outputs"):
            dtype = teacher_dtype(config.teacher.dtype, engine_config, device)
            run_inputs = with_stored_outputs(config, dtype, run_inputs)
    if ranks.rank() == 0:
        print(report.line(ranks.world_size(), num_machines, engine_config), flush=True)
    command = invocation.own()
    if students:
        with doing("loading teacher and students"):
            runs = student_runs(students, own_folders, engine_config, run_inputs, command)
        rows = _train_students(runs, folder, correction)
    else:
        with doing("loading teacher and student"):
            one = DistillationRun(config, engine_config, run_inputs, folder, command)
        rows = _train_one(one, correction)
    with watchdog.long_phase("writing results"):  # other formats of a large model take minutes
        ranks.on_rank_zero(lambda: _conclude(folder, rows, config.run, config.data))
    return rows


def _train_one(run: DistillationRun, correction: dict) -> list[dict]:
    row = run.run()
    return [_teacher_row(run, correction), *_student_rows(run, row | {"name": "homodistil"})]


def _train_students(runs: Sequence[DistillationRun], folder: Path, correction: dict) -> list[dict]:
    """Train the students of one job. Each gets its own table and report, in addition to the job's in `folder`."""
    finished = train_together(runs, folder)
    teacher, rows = _teacher_row(runs[0], correction), []
    for run, row in zip(runs, finished, strict=True):
        student_rows = _student_rows(run, row)
        ranks.on_rank_zero(
            lambda run=run, rows=student_rows: _store(run.folder, [teacher, *rows], run.config.run, run.config.data)
        )
        name = run.config.run.name
        rows += [
            r | {"student": name, "name": r["name"] if name in r["name"] else f"{name}: {r['name']}"}
            for r in student_rows
        ]
    return [teacher, *rows]


def _student_rows(run: DistillationRun, row: dict) -> list[dict]:
    """Rows of a student that is trained, of its family, and of its controls, which are trained now."""
    members = ranks.on_rank_zero(lambda: read_family(run.folder))
    rows = family_rows(row, members, run.config.train.steps)
    for control in controls(run.config, members):
        folder = run.folder / "compare" / control.name
        control_row = DistillationRun(
            control.config, run.engine_config, run.run_inputs, folder, run.exporter.command
        ).run()
        rows.append(control_row | {"name": control.label} | control.facts)
    return rows


def _teacher_row(run: DistillationRun, correction: dict) -> dict:
    parameters = num_parameters(run.teacher.model)
    vocabulary = run.run_inputs.vocabulary
    name = vocabulary.teacher_name if vocabulary else "teacher"
    row = result_row(name, parameters, run.teacher_widths["hidden"], run.evaluate_teacher())
    if vocabulary:
        row |= {"parameters_before": vocabulary.parameters_before, "pieces_before": vocabulary.pieces_before}
        row["cached_teacher"] = Path(run.run_inputs.teacher).name
    if run.config.run.export_milestones:
        with doing("timing the teacher"):
            row |= ranks.on_rank_zero(run.exporter.teacher_speed)
    row |= {name: correction.get(name) for name in ("tokens_per_s_first", "tokens_per_s_last")}
    if correction:
        for name in ("mlm_loss", "lm_loss"):
            if name in correction["before"]:
                row[f"heldout_{name}_before_correction"] = correction["before"][name]
    return row


def _conclude(folder: Path, rows: list[dict], run: RunFolderConfig, data: DataConfig) -> None:
    with doing("writing the report" if run.report else "writing the results"):
        files, formats = _store(folder, rows, run, data)
    tables = "\n\n".join(filter(None, (format_table(rows), _milestones(rows), formats)))
    print("\n".join([f"\n{tables}\n", *(f"{what}: {path}" for what, path in files.items())]), flush=True)


def _milestones(rows: list[dict]) -> str:
    """Table and sentences on the members of the family; empty if the run had no milestones."""
    if not any("milestone" in row for row in rows):
        return ""
    from homodistil.report.milestones import family_text  # imports matplotlib, as below

    return family_text(rows)


def _store(folder: Path, rows: list[dict], run: RunFolderConfig, data: DataConfig) -> tuple[dict[str, Path], str]:
    """Result and report of one run folder, by what they are, and what is to be said of other formats; its model cards
    now know the teacher's results."""
    complete_cards(folder, rows[0])
    files = {"result": write_result(folder, rows)}
    formats = add_formats(Path(folder), run, data)
    if run.report:
        # Imports matplotlib: more than a second of every rank's start, and only rank 0 draws, at the end.
        from homodistil.report import write_report

        files["report"] = write_report(folder)
    return files, formats
