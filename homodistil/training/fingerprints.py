"""What a run learns from, by content: corpus, tokenizer, teacher. A checkpoint knows them; resuming needs the same.

Paths do not count: the same text in another folder is the same text.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from homodistil.checkpoint.folder import saved_fingerprints
from homodistil.config.schema import DataConfig
from homodistil.data.prepare.corpus import check_tokenizer
from homodistil.data.task import task_of
from homodistil.distill.teacher import load_config
from homodistil.errors import UserError
from homodistil.files import file_sha256
from homodistil.models.sentence_modules import SentenceModules
from homodistil.training.embedder import modules_fingerprint

Fingerprints = Mapping[str, str]
"""Hex digests by the names of `_FIELDS`; one that is not there is not compared."""

CORPUS, TOKENIZER, TEACHER, CORRECTED = "corpus", "tokenizer", "teacher", "corrected teacher"
SENTENCE_MODULES, COUNTED_CORPUS, VOCABULARY = "sentence modules", "counted corpus", "vocabulary"
_SAME_TEXT = "give the same text, without a word changed or a file added or removed"
# What a difference is found in, and how to get the old content back.
_FIELDS = {
    TEACHER: ("teacher.name", "give the same weights and config.json"),
    SENTENCE_MODULES: ("teacher.name", "give the same modules.json, and what it lists"),
    TOKENIZER: ("teacher.name", "give the same tokenizer (and versions of tokenizers and transformers)"),
    COUNTED_CORPUS: ("data.sources", _SAME_TEXT),
    VOCABULARY: ("student.vocab", "give the same teacher and text"),
    CORPUS: ("data.sources", _SAME_TEXT),
    CORRECTED: (
        "teacher.correction_steps",
        "put that teacher back into data.cache_dir, or go on with the ranks, ZeRO stage and precision that made it: "
        "only these make it again bitwise",
    ),
}
_SHOWN_DIGITS = 8
# Of config.json: where a copy came from says nothing about the model.
_NOT_CONTENT = ("_name_or_path", "transformers_version")


def begun_with(run_folders: Sequence[Path]) -> dict[str, str] | None:
    """Fingerprints that the checkpoints of these runs hold; None where there is no checkpoint (rank 0 only).

    For a checkpoint of a version without fingerprints one line is printed, and the run continues ({}).
    """
    known = [saved_fingerprints(Path(folder) / "checkpoints") for folder in run_folders]
    known = [saved for saved in known if saved is not None]
    if any(not saved for saved in known):
        print(
            "note: the checkpoint to go on from was written before checkpoints had fingerprints of corpus, tokenizer "
            "and teacher: they are taken to be those that the run began with",
            file=sys.stderr,
            flush=True,
        )
    return {name: value for saved in known for name, value in saved.items()} if known else None


def check_same(run_folder: Path, before: Fingerprints | None, now: Fingerprints) -> None:
    """Raise `UserError` where a run would continue with something else than it began with.

    Args:
        before: of the run's checkpoint; None: there is none.
        now: those that are known so far.
    """
    changed = [name for name in _FIELDS if name in now and (before or {}).get(name, now[name]) != now[name]]
    if not changed:
        return
    field, remedy = _FIELDS[changed[0]]
    told = ", ".join(f"{name} {before[name][:_SHOWN_DIGITS]}, now {now[name][:_SHOWN_DIGITS]}" for name in changed)
    raise UserError(
        f"{field}: is not what the run in {str(run_folder)!r} began with ({told}); {remedy}, or choose another run.dir"
    )


def given_fingerprints(
    data: DataConfig, folder: str, tokenizer: PreTrainedTokenizerBase, modules: SentenceModules | None
) -> Fingerprints:
    """Fingerprints of a teacher as the user gave it. `modules`: of one whose vectors of texts are learned."""
    of_modules = {} if modules is None else {SENTENCE_MODULES: modules_fingerprint(modules)}
    return {TEACHER: teacher_fingerprint(folder), TOKENIZER: tokenizer_fingerprint(data, tokenizer), **of_modules}


def tokenizer_fingerprint(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of everything about the tokenizer that batches depend on. Raises `UserError` as `check_tokenizer`."""
    backend, special_ids = check_tokenizer(config, tokenizer), task_of(config).fingerprint(tokenizer)
    return _digest(json.dumps([backend.to_str(), special_ids, tokenizer.mask_token_id]))


def teacher_fingerprint(teacher: str) -> str:
    """Fingerprint of the weights and the config of a folder; for a hub name the commit that it resolves to."""
    folder = Path(teacher).expanduser()
    if not folder.is_dir():
        return _digest(f"{teacher}@{load_config(teacher)._commit_hash}")
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = {name: value for name, value in content.items() if name not in _NOT_CONTENT}
    return _digest(json.dumps([shape, [file_sha256(file) for file in files]], sort_keys=True))


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]
