"""Checks run config, DeepSpeed's JSON and teacher with all rules that a run applies at its start."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from homodistil.config.schema import RunConfig
from homodistil.distill.losses.active import active_terms
from homodistil.distill.runtime import check_teacher_runtime
from homodistil.distill.student_compile import check_student_compile
from homodistil.distill.teacher import load_config, load_tokenizer
from homodistil.engine.build import resolve_engine_config
from homodistil.engine.ds_config import teacher_dtype, zero_stage
from homodistil.engine.optimizer import check_implementation
from homodistil.preflight.findings import Findings
from homodistil.training.inputs import check_teacher
from homodistil.training.resolve import ResolvedRun, resolve_run
from homodistil.training.run_summary import run_summary


class TeacherFacts(NamedTuple):
    """A valid teacher: its folder, tokenizer, and the run resolved for it."""

    folder: str
    tokenizer: PreTrainedTokenizerBase
    resolved: ResolvedRun


def check_settings(findings: Findings, config: RunConfig, raw_engine_config: dict, device: torch.device) -> dict | None:
    """Check the run config with DeepSpeed's JSON. Returns the resolved engine config, None if there is a problem."""
    before = len(findings)
    num_ranks = int(os.environ.get("WORLD_SIZE", 1))
    engine = findings.attempt("config", lambda: resolve_engine_config(raw_engine_config, config.train, num_ranks))
    findings.attempt("config", lambda: teacher_dtype(config.teacher.dtype, engine or {}, device))
    findings.attempt("config", lambda: check_implementation(config.optimizer.implementation))
    findings.attempt("config", lambda: check_teacher_runtime(config.teacher, device))
    findings.attempt("config", lambda: active_terms(config.loss))
    if engine is not None:
        findings.attempt("config", lambda: check_student_compile(config.student, zero_stage(engine), device))
    if len(findings) == before:
        summary = f"ZeRO-{zero_stage(engine)}, {num_ranks} ranks, {config.train.global_batch_size} sequences per step"
        findings.note("config", f"{summary}, accumulated over {engine['gradient_accumulation_steps']}")
    return engine if len(findings) == before + 1 and findings[-1].is_good else None


def check_model(findings: Findings, config: RunConfig) -> TeacherFacts | None:
    """Check the teacher (downloaded if it is packaged), its weights and tokenizer, and the student's target.

    Returns:
        None if the teacher or its tokenizer cannot be used.
    """
    folder = findings.attempt("model", lambda: check_teacher(config, lambda line: findings.note("model", line)))
    if folder is None:
        return None
    shape = load_config(folder)
    tokenizer = findings.attempt("model", lambda: load_tokenizer(folder, shape, config.data.task))
    if tokenizer is None:
        return None
    resolved = resolve_run(config, shape)
    count, hidden = resolved.teacher_parameters, resolved.teacher_widths["hidden"]
    findings.note("model", f"{config.teacher.name}: {count / 1e6:.1f} M parameters, hidden {hidden}")
    for subject, text in run_summary(resolved).items():
        findings.note(subject, text)
    return TeacherFacts(folder, tokenizer, resolved)
