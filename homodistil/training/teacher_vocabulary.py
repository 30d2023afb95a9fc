"""student.vocab: a teacher with the pieces that stay, and its tokenizer; made once, before step 0, cached by content.

<cache_dir>/teachers/<key>/
    model.safetensors, config.json, tokenizer.json ...   a stock checkpoint; of an embedder, with its modules
    vocabulary.json                                      what was cut (`VocabularyCut`)
    checksums.json                                       file -> bytes and sha256, written last
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from homodistil.config.schema import RunConfig
from homodistil.data.cache import build_once
from homodistil.data.prepare.corpus import corpus_fingerprint, prepare_corpus
from homodistil.data.prepare.integrity import json_object
from homodistil.data.vocabulary.counts import piece_counts
from homodistil.data.vocabulary.cut import cut_tokenizer
from homodistil.distill.teacher import check_stored, has_lm_head, load_config, load_model
from homodistil.distill.teacher_sharding import num_parameters
from homodistil.distributed.fault_injection import fault_point
from homodistil.export.sentence_folder import write_sentence_folder
from homodistil.files import write_atomically
from homodistil.models import family_of
from homodistil.models.family_heads import HeadKind
from homodistil.models.sentence_head import load_sentence_head
from homodistil.models.sentence_modules import SentenceModules
from homodistil.models.vocabulary import keep_rows, special_ids
from homodistil.training.embedder import modules_fingerprint
from homodistil.training.fingerprints import (
    COUNTED_CORPUS,
    VOCABULARY,
    Fingerprints,
    teacher_fingerprint,
    tokenizer_fingerprint,
)
from homodistil.training.teacher_checksums import (
    CHECKSUMS_FILE,
    check_checksums,
    check_weights,
    problem,
    write_checksums,
)
from homodistil.training.vocabulary_size import check_vocabulary, vocabulary_size

FACTS_FILE = "vocabulary.json"
_VERSION = 1
"""Raise it when a change of the code changes which pieces stay."""


class GivenTeacher(NamedTuple):
    """A teacher as the user gave it."""

    folder: str
    """Folder or hub name."""
    tokenizer: PreTrainedTokenizerBase
    modules: SentenceModules | None
    """Of one whose vectors of texts are learned."""
    head: HeadKind
    """What the run uses behind the backbone."""


@dataclass(frozen=True)
class VocabularyCut:
    """What was cut of a teacher."""

    pieces_before: int
    """Rows of its embeddings."""
    pieces: int
    parameters_before: int
    parameters: int
    share_of_tokens: float
    """Of the training text, in the tokenizer of before and without special tokens: tokens whose piece stays."""
    digest: str
    """Of the ids that stay."""
    counted: str
    """Fingerprint of the text whose pieces were counted."""

    @property
    def fingerprints(self) -> Fingerprints:
        """For checkpoints: what the run began with."""
        return {COUNTED_CORPUS: self.counted, VOCABULARY: self.digest}

    @property
    def teacher_name(self) -> str:
        """Of the teacher's row of the result table: what is measured, and how large the teacher was as given."""
        whole = f"whole: {self.parameters_before:,} parameters"
        return f"teacher, {self.pieces:,} of {self.pieces_before:,} pieces ({whole})"

    def __str__(self) -> str:
        return (
            f"{self.pieces_before:,} -> {self.pieces:,} pieces, {self.parameters_before:,} -> {self.parameters:,} "
            f"parameters of the teacher; {self.share_of_tokens:.2%} of the tokens of the training text are of these"
        )


def cut_teacher(config: RunConfig, given: GivenTeacher, accept: Callable[..., object]) -> str:
    """Folder of the teacher with the pieces that student.vocab leaves, in the cache, made unless it is there.

    Args:
        accept: takes the fingerprint of the text whose pieces are counted, by its name; may raise.

    Raises:
        UserError: as `cut_tokenizer` and `prepare_corpus`.
    """
    check_vocabulary(config.student, given.tokenizer)
    counted = corpus_fingerprint(config.data, given.tokenizer)
    accept(**{COUNTED_CORPUS: counted})
    target = Path(config.data.cache_dir).expanduser() / "teachers" / _key(config, given, counted)
    return str(build_once(target, lambda folder: _build(folder, config, given), _damage))


def read_cut(folder: str) -> VocabularyCut:
    """What was cut of the teacher in `folder`, one of `cut_teacher`."""
    return VocabularyCut(**json_object(Path(folder) / FACTS_FILE))


def _key(config: RunConfig, given: GivenTeacher, counted: str) -> str:
    """Content of everything that the folder depends on."""
    modules = None if given.modules is None else modules_fingerprint(given.modules)
    tokenizer = tokenizer_fingerprint(config.data, given.tokenizer)
    content = teacher_fingerprint(given.folder), tokenizer, modules, counted, config.student.vocab, given.head
    return hashlib.sha256(json.dumps([_VERSION, *content]).encode()).hexdigest()[:20]


def _build(folder: Path, config: RunConfig, given: GivenTeacher) -> None:
    teacher_config = load_config(given.folder)
    corpus = prepare_corpus(config.data, given.tokenizer, checked_bytes=math.inf)
    counts = piece_counts(corpus.train, teacher_config.vocab_size)
    smaller = cut_tokenizer(given.tokenizer, counts, vocabulary_size(config.student), _fixed(teacher_config))
    parameters = _write_model(folder, _model(config, given, teacher_config), smaller.kept)
    smaller.write(folder)
    if given.modules is not None:
        head = load_sentence_head(given.modules, "teacher.name")
        hidden_size = family_of(teacher_config.model_type).shape(teacher_config).hidden_size
        write_sentence_folder(folder, head, hidden_size, None, shares_space=True)
    counts[given.tokenizer.all_special_ids] = 0  # padding among them
    share = float(counts[smaller.kept].sum() / counts.sum())
    digest = hashlib.sha256(json.dumps(smaller.kept).encode()).hexdigest()[:32]
    pieces = teacher_config.vocab_size, len(smaller.kept)
    facts = VocabularyCut(*pieces, *parameters, share, digest, corpus.fingerprint)
    write_atomically(folder / FACTS_FILE, json.dumps(dataclasses.asdict(facts), indent=1) + "\n")
    write_checksums(folder, (path for path in folder.rglob("*") if path.is_file()))
    fault_point("vocabulary.written")


def _write_model(folder: Path, model: torch.nn.Module, kept: Sequence[int]) -> tuple[int, int]:
    """A stock model with these rows alone. Returns the parameters before and after."""
    family, before = family_of(model.config.model_type), num_parameters(model)
    keep_rows(model, family, kept)
    (family.backbone(model) if family.head_kind(model) == "none" else model).save_pretrained(folder)
    return before, num_parameters(model)


def _model(config: RunConfig, given: GivenTeacher, teacher_config: PretrainedConfig) -> torch.nn.Module:
    """The teacher's model; without a head where it has no trained one, or the run uses none."""
    allow_pickle, head = config.teacher.allow_pickle, given.head
    if head == "lm":
        is_trained = check_stored(given.folder, teacher_config, allow_pickle)
        is_trained = has_lm_head(given.folder, allow_pickle) if is_trained is None else is_trained
        head = "lm" if is_trained else "none"
    dtype = getattr(teacher_config, "dtype", None) or torch.float32
    return load_model(given.folder, dtype, allow_pickle=allow_pickle, head=head)


def _fixed(teacher_config: PretrainedConfig) -> set[int]:
    """Ids that the model itself goes by."""
    family, ids = family_of(teacher_config.model_type), special_ids(teacher_config)
    behind_padding = teacher_config.pad_token_id + 1 if family.positions_start_behind_padding else 0
    return ids | set(range(behind_padding))


def _damage(folder: Path) -> str | None:
    return problem(lambda: _check(folder))


def _check(folder: Path) -> None:
    if not (folder / CHECKSUMS_FILE).is_file():
        raise ValueError(f"no {CHECKSUMS_FILE}")
    check_checksums(folder)
    check_weights(folder)
    read_cut(str(folder))
