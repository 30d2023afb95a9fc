"""What a run of task `embedding` takes from its teacher's sentence modules: the task, the prompt, pooling and Dense."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from homodistil.config.schema import DataConfig
from homodistil.data.prepare.texts import NO_PROMPT
from homodistil.data.task import ENCODER_TASKS, task_of
from homodistil.files import file_sha256
from homodistil.models.family import ModelFamily
from homodistil.models.sentence_head import WEIGHTS_FILE
from homodistil.models.sentence_modules import (
    SentenceModules,
    read_sentence_modules,
    sentence_file,
    sentence_root,
    transformer_folder,
)

FIELD = "teacher.name"


def teacher_of_folder(folder: Path) -> Path:
    """The folder with the weights of a local teacher: one of sentence-transformers may have them in a subfolder."""
    return transformer_folder(folder, FIELD)


def is_embedder(data: DataConfig, family: ModelFamily, folder: str | None) -> bool:
    """Whether a teacher, left to decide on the task, is a sentence embedder: an encoder with a modules.json.

    Args:
        folder: folder or hub name of the teacher; None: not to be looked at.
    """
    may_be = data.task == "auto" and family.task in ENCODER_TASKS
    return may_be and folder is not None and sentence_root(folder) is not None


def sentence_modules_of(data: DataConfig, folder: str | None) -> SentenceModules | None:
    """The teacher's modules, with the pooling of the config; None where the task pools nothing.

    Raises:
        UserError: modules that are not supported, or damaged.
    """
    if not task_of(data).has_vectors:
        return None
    return SentenceModules() if folder is None else read_sentence_modules(folder, data.pooling, FIELD)


def settle_texts(data: DataConfig, folder: str | None) -> None:
    """Replace the name of a prompt by its text, and what a text is where texts have labels, in place. Raises as
    `sentence_modules_of`."""
    if data.label_column:
        data.texts = "document"  # labels are those of whole lines
    if (modules := sentence_modules_of(data, folder)) is not None:
        data.prompt = modules.prompt(data.prompt) or NO_PROMPT
    elif task_of(data).has_single_texts and data.prompt == "auto":
        data.prompt = NO_PROMPT


def modules_fingerprint(modules: SentenceModules) -> str:
    """Hex digest of what the vectors depend on behind the hidden states."""
    content = dataclasses.asdict(modules) | {"root": None}
    files = (sentence_file(modules.root, f"{dense.folder}/{WEIGHTS_FILE}") for dense in modules.dense)
    hashes = [file_sha256(file) if file else None for file in files]
    return hashlib.sha256(json.dumps([content, hashes], sort_keys=True).encode()).hexdigest()
