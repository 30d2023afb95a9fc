"""Whether checkpoints, export and cache have room where they are to be written. Nothing is left there."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from homodistil.config.schema import RunConfig
from homodistil.preflight.findings import Findings
from homodistil.training.run_folder import check_run_folder

FP32_BYTES = 4
ADAM_TENSORS = 3
"""fp32 master weights and the two moments of AdamW."""


def run_bytes(config: RunConfig, num_parameters: int) -> int:
    """Most bytes that a run writes into its folder, logs left out: checkpoints at the first widths, and the exports.

    One checkpoint more than are kept is there while the newest is written.
    """
    checkpoint = ADAM_TENSORS * FP32_BYTES * num_parameters
    num_exports = 1 + len(config.run.export_milestones)
    one = (config.run.keep_checkpoints + 1) * checkpoint + num_exports * FP32_BYTES * num_parameters
    return one * (1 + len(config.run.compare))


def cache_bytes(config: RunConfig, num_parameters: int, text_bytes: int) -> int:
    """Most bytes that preparing adds to `data.cache_dir`.

    The text as Arrow, its tokens (4 bytes each, one for 4 characters) and the blocks; and the corrected teacher.
    """
    corrected = FP32_BYTES * num_parameters if config.teacher.correction_steps else 0
    return 3 * text_bytes + corrected


def check_disk(findings: Findings, subject: str, folder: Path, needed: int) -> None:
    """Room and permission at `folder`, which need not exist yet."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):  # a file without a name, where the file system has such
            pass
        free = shutil.disk_usage(there).free
    except OSError as error:
        return findings.refuse(
            subject, f"{there} cannot be written to ({error.strerror})", "make it writable, or name another folder"
        )
    usage = f"{folder}: {needed / 1e9:.2f} GB at most, {free / 1e9:.2f} GB free"
    if needed > free:
        return findings.refuse(subject, usage, "free disk space, name another folder, or lower run.keep_checkpoints")
    findings.note(subject, usage)


def check_folders(findings: Findings, config: RunConfig, num_parameters: int, text_bytes: int, is_first: bool) -> None:
    """`is_first`: on rank 0, which alone writes into the run folder."""
    if is_first and (folder := findings.attempt("run folder", lambda: check_run_folder(config))):
        check_disk(findings, "run folder", folder, run_bytes(config, num_parameters))
    cache = Path(config.data.cache_dir).expanduser().absolute()
    check_disk(findings, "cache folder", cache, cache_bytes(config, num_parameters, text_bytes))
