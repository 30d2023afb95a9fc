"""Checks that checkpoints, exports and cache can be written and fit on their disks. Leaves no files behind."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from homodistil.config.schema import RunFolderConfig, TeacherConfig
from homodistil.preflight.findings import Findings

FP32_BYTES = 4
ADAM_TENSORS = 3
"""fp32 master weights and the two moments of AdamW."""


def run_bytes(run: RunFolderConfig, num_parameters: int) -> int:
    """Upper bound of the bytes that a run writes into its folder: checkpoints at the first widths, and exports.

    Logs are not counted. While the newest checkpoint is written, one more exists than `run.keep_checkpoints`.
    """
    checkpoint = ADAM_TENSORS * FP32_BYTES * num_parameters
    num_exports = 1 + len(run.export_milestones)
    one = (run.keep_checkpoints + 1) * checkpoint + num_exports * FP32_BYTES * num_parameters
    return one * (1 + len(run.compare))


def cache_bytes(teacher: TeacherConfig, num_parameters: int, text_bytes: int, cuts_vocabulary: bool = False) -> int:
    """Upper bound of the bytes that the preparation adds to `data.cache_dir`.

    These are the text as Arrow, its tokens (4 bytes per token, about 4 characters), the blocks, and the corrected
    teacher; with a smaller vocabulary all of this twice, as the text is tokenised twice, and another teacher.

    Args:
        num_parameters: of the teacher that is trained with.
        text_bytes: size of the text on disk.
        cuts_vocabulary: whether student.vocab takes pieces out of the teacher.
    """
    teachers = bool(teacher.correction_steps) + cuts_vocabulary
    return 3 * text_bytes * (1 + cuts_vocabulary) + teachers * FP32_BYTES * num_parameters


def check_disk(findings: Findings, subject: str, folder: Path, needed: int) -> None:
    """Check for `needed` free bytes and write permission at `folder`, which need not exist yet."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):  # has no name on most file systems, so nothing can stay behind
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
