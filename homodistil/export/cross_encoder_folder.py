"""What sentence-transformers' CrossEncoder keeps beside a checkpoint: its modules, activation and prompts.

None of it depends on widths, so that a student's are the teacher's, as they are. Without these files (a folder that
transformers has saved) CrossEncoder has its own defaults, for student and teacher alike.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from homodistil.models.checkpoint_files import read_json
from homodistil.models.sentence_modules import CROSS_ENCODER, LENGTH_FILE, MODULES_FILE, PROMPTS_FILE, sentence_file


def copy_cross_encoder_files(teacher: str, folder: Path) -> None:
    """Copy them into `folder`, which has the student's Transformer; nothing where the teacher has none.

    Args:
        teacher: folder or hub name.

    Raises:
        UserError: the teacher's are damaged.
    """
    settings = sentence_file(teacher, PROMPTS_FILE)
    if settings is None or read_json(settings, "teacher.name").get("model_type") != CROSS_ENCODER:
        return
    for name in (PROMPTS_FILE, LENGTH_FILE, MODULES_FILE):
        if (file := sentence_file(teacher, name)) is not None:
            shutil.copyfile(file, folder / name)
