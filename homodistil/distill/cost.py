"""What a training step costs: the models' part (models/flops.py, models/memory.py) and that of every active term.

Whoever wants FLOPs or bytes of a step asks here, so that a term from outside is counted as the others are.
"""

from __future__ import annotations

from homodistil.config.schema import LossConfig
from homodistil.distill.losses.active import active_terms
from homodistil.distill.losses.term import BatchSizes, Term
from homodistil.models.architecture import BERT_LIKE, Architecture
from homodistil.models.axes import Widths
from homodistil.models.flops import StepFlops, backbone_flops, head_flops
from homodistil.models.memory import SequenceBytes, backbone_bytes, compared_elements, head_bytes, probability_bytes


def step_flops(
    student: Widths,
    teacher: Widths,
    loss: LossConfig,
    *,
    num_sequences: int,
    seq_len: int,
    target_rows: float,
    vocab_size: int,
    architecture: Architecture = BERT_LIKE,
    runs_teacher: bool = True,
) -> StepFlops:
    """FLOPs of one optimizer step at the student's current widths.

    Args:
        student, teacher: axis -> width (`models.axes`); the student may have fewer layers.
        loss: a term of weight 0 costs nothing; without any term that needs it the teacher does not run.
        num_sequences: global batch size in sequences.
        seq_len: tokens of a sequence, padding included.
        target_rows: rows to predict, over the whole global batch.
        vocab_size: rows of the decoder.
        architecture: of both models (`ModelFamily.architecture`).
        runs_teacher: False where what terms ask of it is stored.
    """
    terms = active_terms(loss)
    sizes = BatchSizes(student, teacher, num_sequences, seq_len, target_rows, vocab_size, architecture=architecture)
    forward, of_teacher = (
        backbone_flops(widths, sizes.tokens, seq_len, architecture) + head_flops(widths, rows, vocab_size, architecture)
        for widths, rows in zip((student, teacher), _head_rows(terms, sizes), strict=True)
    )
    return StepFlops(
        teacher=of_teacher if runs_teacher and any(term.needs_teacher for term in terms) else 0,
        student=3 * forward,  # backward: one product for the gradient of each of the two factors
        losses=sum(term.flops(sizes) for term in terms),
    )


def sequence_bytes(
    student: Widths,
    teacher: Widths,
    loss: LossConfig,
    *,
    seq_len: int,
    target_rows: float,
    vocab_size: int,
    student_bytes: int,
    teacher_bytes: int,
    lock_step: bool = True,
    keeps_probabilities: bool = False,
    architecture: Architecture = BERT_LIKE,
) -> SequenceBytes:
    """Activations of one sequence at the student's current widths.

    Dropout masks are left out: off by default, and a small share of what they are made for. So are the gradients of
    decoder and projections that the losses make in their forward: they do not grow with the batch.

    Args:
        student, teacher: axis -> width (`models.axes`); the student may have fewer layers.
        loss: a term of weight 0 saves nothing; without any term that needs it the teacher does not run.
        seq_len: tokens of a sequence, padding included.
        target_rows: rows to predict in a sequence (an expected value).
        vocab_size: rows of the decoder.
        student_bytes, teacher_bytes: bytes of an element of each model's activations.
        lock_step: whether the teacher's layers run beside the student's (distill/teacher_outputs.py).
        keeps_probabilities: whether the student's attention saves them (models/attention.py).
        architecture: of both models (`ModelFamily.architecture`).
    """
    terms = active_terms(loss)
    sizes = BatchSizes(
        student, teacher, 1, seq_len, target_rows, vocab_size, student_bytes, teacher_bytes, architecture
    )
    student_rows, _ = _head_rows(terms, sizes)
    model = backbone_bytes(student, seq_len, student_bytes, architecture)
    model += head_bytes(student, student_rows, student_bytes, architecture)
    if keeps_probabilities or architecture.has_position_bias:
        model += probability_bytes(student, seq_len, student_bytes, architecture)
    runs_whole = not lock_step and any(term.needs_teacher for term in terms)
    held = compared_elements(teacher, seq_len, architecture) if runs_whole else 0
    return SequenceBytes(model, sum(term.saved_bytes(sizes) for term in terms), teacher_bytes * held)


def logit_rows(loss: LossConfig, sizes: BatchSizes) -> float:
    """Rows whose whole logits stay until the backward pass begins."""
    return sum(term.logit_rows(sizes) for term in active_terms(loss))


def _head_rows(terms: list[Term], sizes: BatchSizes) -> tuple[float, float]:
    """Rows of (student, teacher) that go through the vocabulary head."""
    rows = [term.head_rows(sizes) for term in terms]
    return sum(student for student, _ in rows), sum(teacher for _, teacher in rows)
