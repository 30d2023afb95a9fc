"""Checks before a run whether it could start: everything that takes about a minute, on every rank, in one table.

    deepspeed launcher/train.py --check --deepspeed ds_configs/zero2.json ...

All problems are collected, instead of stopping at the first. A training step is tried only if nothing else is wrong.
Every machine checks its own cache and disks; no path of one machine is passed to another. Nothing is written except to
the cache of packaged teachers and texts.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import torch

from homodistil.config.schema import RunConfig
from homodistil.data.task import task_of
from homodistil.distributed import graceful_stop, ranks, watchdog
from homodistil.distributed.exit_codes import USER_ERROR
from homodistil.engine.build import init_ranks, load_engine_config
from homodistil.metrics.progress import doing
from homodistil.preflight.disk import check_folders
from homodistil.preflight.findings import Finding, Findings, format_findings, merged
from homodistil.preflight.memory import check_memory, step_bytes
from homodistil.preflight.port import check_port
from homodistil.preflight.settings import TeacherFacts, check_model, check_settings
from homodistil.preflight.step import try_step
from homodistil.preflight.text import Sample, blocks, check_text

JOIN_TIMEOUT_S = 120.0
PROBE_BLOCKS = 16
"""Minimum blocks per rank, enough for the gap probe and the statistics of a compensated cut."""


def check(config: RunConfig, engine_config_path: Path) -> int:
    """Run all checks and print the table on rank 0. Every rank calls it.

    Returns:
        The exit code: 0, or USER_ERROR if a check failed.

    Raises:
        UserError: the JSON at `engine_config_path` cannot be used.
        RankLost: not all ranks have joined in time.
    """
    start_s = time.perf_counter()
    raw_engine_config = load_engine_config(engine_config_path)
    findings = Findings()
    check_port(findings)
    if not findings.are_good:  # the ranks cannot join, so rank 0 reports alone
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        _look(findings, config, raw_engine_config, device)
        return _conclude(findings, start_s)
    device = init_ranks(min(config.run.rank_timeout_s, JOIN_TIMEOUT_S))
    with graceful_stop.on_signals(), watchdog.watching(config.run.rank_timeout_s):
        with watchdog.long_phase("checking"), doing("checking"):
            findings = _check_all(config, raw_engine_config, device)
        return _conclude(findings, start_s)


def _check_all(config: RunConfig, raw_engine_config: dict, device: torch.device) -> Findings:
    local = Findings()
    local.note("port", f"{ranks.world_size()} ranks met at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
    facts, sample = _look(local, config, raw_engine_config, device)
    merged = _merged(local)
    if not merged.are_good:
        return merged
    # All ranks use the rows of rank 0, but not its folder of the teacher, which may be on another machine.
    num_blocks = ranks.world_size() * max(config.train.micro_batch_size, PROBE_BLOCKS)
    seq_len = config.data.seq_len
    task = task_of(config.data)
    rows = ranks.on_rank_zero(lambda: blocks(sample, task.frame(facts.tokenizer), seq_len, num_blocks).tolist())
    rows = np.asarray(rows, dtype=np.int64)
    facts = facts or check_model(Findings(), config)
    tried = Findings()
    tried.attempt(
        "step", lambda: try_step(tried, config, raw_engine_config, facts.folder, facts.tokenizer, rows, device)
    )
    return Findings([*merged, *_merged(tried)])


def _merged(local: Findings) -> Findings:
    """The findings of all ranks."""
    return merged([[Finding(*row) for row in rows] for rows in ranks.gather([dataclasses.astuple(f) for f in local])])


def _look(
    findings: Findings, config: RunConfig, raw_engine_config: dict, device: torch.device
) -> tuple[TeacherFacts | None, Sample | None]:
    """The checks that need no other rank: text and disks on one rank per machine, memory on every rank."""
    engine_config = check_settings(findings, config, raw_engine_config, device)
    facts = check_model(findings, config)
    if facts and engine_config:
        check_memory(findings, step_bytes(facts.resolved, engine_config, device), device)
    if int(os.environ.get("LOCAL_RANK", 0)):
        return facts, None
    sample = check_text(findings, config.data, facts.tokenizer) if facts else None
    size = facts.resolved.teacher_parameters if facts else 0
    check_folders(findings, config, size, sample.num_bytes if sample else 0, ranks.rank() == 0)
    return facts, sample


def _conclude(findings: Findings, start_s: float) -> int:
    if ranks.rank() == 0:
        num_bad = sum(not finding.is_good for finding in findings)
        verdict = f"{num_bad} to fix before this run can start" if num_bad else "this run can start"
        print(f"{format_findings(findings)}\n\n{verdict} ({time.perf_counter() - start_s:.0f} s)", flush=True)
    return 0 if findings.are_good else USER_ERROR
