"""Checks before a run whether it could start: everything that takes about a minute, on every rank, in one table.

    deepspeed launcher/train.py --check --deepspeed ds_configs/zero2.json ...

All problems are collected, instead of stopping at the first. A training step is tried only if nothing else is wrong.
Every machine checks its own cache and disks; no path of one machine is passed to another. Nothing is written except to
the cache of packaged teachers and texts.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time

import numpy as np
import torch

from homodistil.config.command_line import Job
from homodistil.data.task import task_of
from homodistil.data.vocabulary.choice import ALL
from homodistil.distill.teacher import load_config
from homodistil.distributed import graceful_stop, ranks, watchdog
from homodistil.distributed.exit_codes import USER_ERROR
from homodistil.engine.build import init_ranks, load_engine_config, resolve_engine_config
from homodistil.metrics.progress import doing
from homodistil.preflight.disk import cache_bytes, check_disk, run_bytes
from homodistil.preflight.findings import Finding, Findings, format_findings, merged
from homodistil.preflight.labels import check_labels
from homodistil.preflight.memory import check_memory, step_bytes
from homodistil.preflight.port import check_port
from homodistil.preflight.settings import check_model, check_settings
from homodistil.preflight.step import try_step
from homodistil.preflight.text import Sample, blocks, check_text
from homodistil.training.run_folder import check_run_folder
from homodistil.training.settings import settings_checks
from homodistil.training.short_runs import trial
from homodistil.training.teacher_checks import cache_dir
from homodistil.training.teacher_facts import TeacherFacts, teacher_facts

JOIN_TIMEOUT_S = 120.0
PROBE_BLOCKS = 16
"""Minimum blocks per rank, enough for the gap probe and the statistics of a compensated cut."""


def check(job: Job) -> int:
    """Run all checks and print the table on rank 0. Every rank calls it.

    Returns:
        The exit code: 0, or USER_ERROR if a check failed.

    Raises:
        UserError: DeepSpeed's JSON cannot be read.
        RankLost: not all ranks have joined in time.
    """
    start_s = time.perf_counter()
    raw_engine_config = load_engine_config(job.engine_config)
    findings = Findings()
    check_port(findings)
    if not findings.are_good:  # the ranks cannot join, so rank 0 reports alone
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        _look(findings, job, raw_engine_config, device)
        return _conclude(findings, start_s)
    timeout_s = job.config.run.rank_timeout_s
    device = init_ranks(min(timeout_s, JOIN_TIMEOUT_S))
    with graceful_stop.on_signals(), watchdog.watching(timeout_s):
        with watchdog.long_phase("checking"), doing("checking"):
            findings = _check_all(job, raw_engine_config, device)
        return _conclude(findings, start_s)


def _check_all(job: Job, raw_engine_config: dict, device: torch.device) -> Findings:
    local = Findings()
    local.note("port", f"{ranks.world_size()} ranks met at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
    facts, sample = _look(local, job, raw_engine_config, device)
    merged = _merged(local)
    if not merged.are_good:
        return merged
    # All ranks use the rows of rank 0, but not its folder of the teacher, which may be on another machine.
    num_blocks = ranks.world_size() * max(job.config.train.micro_batch_size, PROBE_BLOCKS)
    data = job.config.data
    rows = ranks.on_rank_zero(
        lambda: blocks(sample, task_of(data).frame(facts.tokenizer), data.seq_len, num_blocks).tolist()
    )
    rows = np.asarray(rows, dtype=np.int64)
    tried = Findings()
    tried.attempt("step", lambda: try_step(tried, trial(job.config, raw_engine_config, facts, rows, device)))
    return Findings([*merged, *_merged(tried)])


def _merged(local: Findings) -> Findings:
    """The findings of all ranks."""
    return merged([[Finding(*row) for row in rows] for rows in ranks.gather([dataclasses.astuple(f) for f in local])])


def _look(
    findings: Findings, job: Job, raw_engine_config: dict, device: torch.device
) -> tuple[TeacherFacts | None, Sample | None]:
    """The checks that need no other rank: text and disks on one rank per machine, memory on every rank."""
    config, num_ranks = job.config, int(os.environ.get("WORLD_SIZE", 1))
    engine_config = check_settings(
        findings,
        lambda: resolve_engine_config(raw_engine_config, config.train, num_ranks),
        lambda engine: settings_checks(config, engine, device),
        config.train,
    )
    facts = check_model(findings, functools.partial(teacher_facts, config))
    if facts and engine_config:
        check_memory(findings, step_bytes(facts.resolved, engine_config, device), device)
    if int(os.environ.get("LOCAL_RANK", 0)):
        return facts, None
    sample = check_text(findings, config.data, facts.tokenizer) if facts else None
    if sample is not None:
        check_labels(findings, config.data, load_config(facts.folder))
    size = facts.resolved.teacher_parameters if facts else 0
    _check_disks(findings, job, size, sample.num_bytes if sample else 0)
    return facts, sample


def _check_disks(findings: Findings, job: Job, num_parameters: int, text_bytes: int) -> None:
    """The cache folder and, on rank 0, the run folder, which only rank 0 writes to.

    Args:
        num_parameters: of the teacher.
        text_bytes: size of the text on disk.
    """
    config = job.config
    if ranks.rank() == 0 and (folder := findings.attempt("run folder", lambda: check_run_folder(config))):
        check_disk(findings, "run folder", folder, run_bytes(config.run, num_parameters))
    needed = cache_bytes(config.teacher, num_parameters, text_bytes, config.student.vocab != ALL)
    check_disk(findings, "cache folder", cache_dir(config).absolute(), needed)


def _conclude(findings: Findings, start_s: float) -> int:
    if ranks.rank() == 0:
        num_bad = sum(not finding.is_good for finding in findings)
        verdict = f"{num_bad} to fix before this run can start" if num_bad else "this run can start"
        print(f"{format_findings(findings)}\n\n{verdict} ({time.perf_counter() - start_s:.0f} s)", flush=True)
    return 0 if findings.are_good else USER_ERROR
