"""Checks run config, DeepSpeed's JSON and teacher with all rules that a run applies at its start."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from homodistil.config.schema import TrainConfig
from homodistil.engine.ds_config import zero_stage
from homodistil.preflight.findings import Findings
from homodistil.training.run_summary import run_summary
from homodistil.training.teacher_facts import TeacherFacts


def check_settings(
    findings: Findings,
    resolve: Callable[[], dict],
    checks_of: Callable[[dict | None], Iterable[Callable[[], object]]],
    train: TrainConfig,
) -> dict | None:
    """Check the run config with DeepSpeed's JSON. Returns the resolved engine config, None if there is a problem.

    Args:
        resolve: DeepSpeed's JSON, resolved; raises `UserError` if it cannot be used.
        checks_of: `settings_checks` of a config; takes that JSON (None: it cannot be used).
    """
    before = len(findings)
    engine = findings.attempt("config", resolve)
    for check in checks_of(engine):
        findings.attempt("config", check)
    if len(findings) == before:
        num_ranks = int(os.environ.get("WORLD_SIZE", 1))
        summary = f"ZeRO-{zero_stage(engine)}, {num_ranks} ranks, {train.global_batch_size} sequences per step"
        findings.note("config", f"{summary}, accumulated over {engine['gradient_accumulation_steps']}")
    return engine if len(findings) == before + 1 and findings[-1].is_good else None


def check_model(findings: Findings, look_at: Callable[[Callable[[str], None]], TeacherFacts]) -> TeacherFacts | None:
    """Check the teacher, its weights and tokenizer, and the student's target.

    Args:
        look_at: `teacher_facts` of a config; takes what takes a line to show.

    Returns:
        None if the teacher or its tokenizer cannot be used.
    """
    facts = findings.attempt("model", lambda: look_at(lambda line: findings.note("model", line)))
    if facts is None:
        return None
    resolved = facts.resolved
    count, hidden = resolved.teacher_parameters, resolved.teacher_widths["hidden"]
    findings.note("model", f"{resolved.config.teacher.name}: {count / 1e6:.1f} M parameters, hidden {hidden}")
    if resolved.vocabulary_note:
        findings.note("vocabulary", resolved.vocabulary_note)
    for subject, text in run_summary(resolved).items():
        findings.note(subject, text)
    return facts
