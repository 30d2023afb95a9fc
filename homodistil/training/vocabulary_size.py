"""What student.vocab means as long as no text has been counted: for checks, and for a plan."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from homodistil.config.schema import StudentConfig
from homodistil.data.vocabulary.choice import ALL, CORPUS, Size
from homodistil.data.vocabulary.cut import check_cuttable
from homodistil.data.vocabulary.piece_models import FIELD
from homodistil.errors import UserError
from homodistil.models.vocabulary import with_vocab_size


def vocabulary_size(student: StudentConfig) -> Size | None:
    """student.vocab: a number of pieces, or "corpus"; None: all of them."""
    if student.vocab == ALL:
        return None
    return CORPUS if student.vocab == CORPUS else int(student.vocab)


def check_vocabulary(student: StudentConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `UserError` where student.vocab cannot be had of this tokenizer, whatever the text."""
    if (size := vocabulary_size(student)) is not None:
        check_cuttable(tokenizer, size)


def planned_config(student: StudentConfig, teacher_config: PretrainedConfig) -> PretrainedConfig:
    """The teacher's configuration as student.vocab leaves it, as far as that is known without text.

    Raises:
        UserError: more pieces than the teacher has.
    """
    size = vocabulary_size(student)
    if not isinstance(size, int):
        return teacher_config
    if size > teacher_config.vocab_size:
        raise UserError(
            f"{FIELD}: found {size}, the teacher has {teacher_config.vocab_size} pieces; set it to fewer, or to {ALL}"
        )
    return with_vocab_size(teacher_config, size)
