"""Predicted bytes against what torch really saves for the backward pass, and against what a real optimizer holds."""

from __future__ import annotations

import pytest
import torch
from families import cases
from support.small import VOCABULARY, random_keep, small_model

from homodistil.config.schema import LossConfig
from homodistil.data.batch import Batch, LossCounts
from homodistil.distill.cost import sequence_bytes
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.models.activations import show_values
from homodistil.models.attention import keeps_probabilities
from homodistil.models.axes import Widths, kind_of
from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.resize_plan import make_plan, slice_module

ROWS, TOKENS, EVERY = 4, 16, 5
NARROW = {"hidden": 13, "layer.0.ffn": 21, "layer.1.ffn": 40, "layer.2.ffn": 9}
NARROW |= {f"layer.{i}.{axis}": n for i in range(3) for axis, n in (("heads", 3), ("qk_dim", 4), ("vo_dim", 4))}


def full_batch(vocabulary: int = VOCABULARY) -> Batch:
    """No padding: every fifth token is masked."""
    ids = torch.randint(5, vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    index = torch.arange(0, ROWS * TOKENS, EVERY)
    counts = LossCounts(*torch.tensor([len(index), ids.numel(), ROWS * TOKENS**2]).float().unbind())
    return Batch(ids, torch.ones_like(ids), index, ids.flatten()[index], torch.arange(ids.numel()), counts)


def saved_bytes(student: Student, teacher: Teacher | None, batch: Batch) -> tuple[int, int]:
    """(saved for backward by forward pass and terms, held by the teacher before the student runs)."""
    known = {p.untyped_storage().data_ptr() for p in student.parameters()}
    saved: dict[int, torch.Tensor] = {}  # the tensor is kept, so that no address is used twice

    def see(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    held = _taps_bytes(teacher, batch) if teacher else 0
    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        terms = student(batch, teacher(batch) if teacher else None)
    assert terms.total.requires_grad
    return sum(t.untyped_storage().nbytes() for t in saved.values()), held


def _taps_bytes(teacher: Teacher, batch: Batch) -> int:
    tapped = teacher.run(batch)
    tensors = [tapped.embedding, *tapped.layers, *tapped.queries, *tapped.keys]
    # Values are held for one layer only, and for relations alone: left out of the prediction as well.
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def made_in_forward(student: Student) -> int:
    """Bytes of weight gradients (fp32) that the terms save: decoder with KL on all tokens, learned projections."""
    config = student.objective.config
    decoder = student.family.decoder(student.model) if config.kl and config.kl_positions == "all" else None
    numels = [p.numel() for n, p in student.projections.named_parameters() if p.requires_grad and n != "last.weight"]
    numels += [p.numel() for p in decoder.parameters()] if decoder is not None else []
    return 4 * sum(numels)


def shrink(student: Student, widths: Widths) -> None:
    plan = make_plan(student.axis_table(), random_keep(student.axis_table(), widths))
    slice_module(student, plan)
    student.after_resize(plan.keep)


@pytest.mark.parametrize("narrow", [False, True], ids=["start", "narrow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"kl_positions": "all", "attention_target": "probabilities"},
        {"projection": "teacher", "projection_learned": False},
        {"hidden_space": "normalised", "attention_target": "centred_scores"},
        {"attention": 0.0, "kl": 0.0},
        {"mlm": 0.0, "hidden": 0.0, "embedding": 0.0},
        {"kl": 0.0, "hidden": 0.0, "attention": 0.0, "embedding": 0.0},
        {"kl": 0.0, "hidden": 0.0, "attention": 0.0, "embedding": 0.0, "cosine": 1.0, "relations": 1.0},
    ],
    ids=["all", "kl_all", "teacher_side", "normalised", "hidden", "kl_attention", "mlm", "last_layer"],
)
def test_sequence_bytes_are_what_autograd_saves(loss, dtype, narrow):
    config, batch = LossConfig(**({"kl": 1.0} | loss)), full_batch()
    student, teacher = Student(small_model(), config), Teacher(small_model())
    show_values(teacher.model, bert, -1)
    if narrow:
        shrink(student, NARROW)
    student, teacher = student.to(dtype), teacher.to(dtype)
    distils = student.objective.needs_teacher
    saved, held = saved_bytes(student, teacher if distils else None, batch)
    saved -= made_in_forward(student) if distils else 0
    target_rows = len(batch.target_index) / ROWS
    predicted = sequence_bytes(
        student.widths,
        Student(small_model(), config).widths,
        config,
        seq_len=TOKENS,
        target_rows=target_rows,
        vocab_size=VOCABULARY,
        student_bytes=dtype.itemsize,
        teacher_bytes=dtype.itemsize,
        lock_step=False,
        keeps_probabilities=keeps_probabilities("cpu", dtype),
    )
    on_rows = (config.mlm or config.kl) and not (config.kl and config.kl_positions == "all")
    first_gradient = target_rows * VOCABULARY * dtype.itemsize if on_rows else 0  # predicted, but never saved
    # fp32: scalars and index tensors are left out. bf16: LayerNorm's statistics, on a GPU fp32, are bf16 on a CPU.
    tolerance = 0.01 if dtype == torch.float32 else 0.03
    assert ROWS * (predicted.student + predicted.losses - first_gradient) == pytest.approx(saved, rel=tolerance)
    assert ROWS * predicted.teacher == pytest.approx(held, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("loss", "narrow"),
    [({}, True), ({"kl": 0.0, "hidden": 0.0, "attention": 0.0, "embedding": 0.0}, False)],
    ids=["all-narrow", "mlm-start"],
)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "olmo2", "gpt2"])
def test_bytes_of_blocks_with_a_norm_before_them(model_type, loss, dtype, narrow):
    config, batch = LossConfig(**({"kl": 1.0} | loss)), full_batch(cases.VOCABULARY)
    student, teacher = Student(cases.make_model(model_type), config), Teacher(cases.make_model(model_type))
    teacher_widths, family = student.widths, student.family
    if narrow:
        kinds = {"hidden": 25, "ffn": 31, "heads": 3, "kv_heads": 2}
        shrink(student, {axis: kinds[kind_of(axis)] for axis in teacher_widths if kind_of(axis) in kinds})
    student, teacher = student.to(dtype), teacher.to(dtype)
    distils = student.objective.needs_teacher
    saved, held = saved_bytes(student, teacher if distils else None, batch)
    decoder = sum(p.numel() for p in family.decoder(student.model).parameters())
    projections = sum(p.numel() for p in student.projections.parameters() if p.requires_grad) if distils else 0
    saved -= 4 * (decoder + projections)
    predicted = sequence_bytes(
        student.widths,
        teacher_widths,
        config,
        seq_len=TOKENS,
        target_rows=len(batch.target_index) / ROWS,
        vocab_size=cases.VOCABULARY,
        student_bytes=dtype.itemsize,
        teacher_bytes=dtype.itemsize,
        lock_step=False,
        keeps_probabilities=keeps_probabilities("cpu", dtype),
        architecture=family.architecture,
    )
    # Rotary tensors and, in Gemma 3, 1 + weight do not grow with the sequences: not predicted. bf16: as above.
    assert ROWS * (predicted.student + predicted.losses) == pytest.approx(saved, rel=0.015)
    assert ROWS * predicted.teacher == pytest.approx(held, rel=1e-9)


@pytest.mark.parametrize("model_type", ["distilbert", "electra", "mpnet"])
def test_bytes_of_other_encoders_are_what_autograd_saves(model_type):
    """DistilBERT has no token types, ELECTRA embeddings of a width of their own; MPNet keeps its probabilities."""
    config, batch = LossConfig(kl=1.0), full_batch()
    batch = batch._replace(input_ids=batch.input_ids % 90, target_ids=batch.target_ids % 90)
    student, teacher = Student(cases.make_model(model_type), config), Teacher(cases.make_model(model_type))
    saved, held = saved_bytes(student, teacher, batch)
    family, target_rows = student.family, len(batch.target_index) / ROWS
    predicted = sequence_bytes(
        student.widths,
        student.widths,
        config,
        seq_len=TOKENS,
        target_rows=target_rows,
        vocab_size=student.model.config.vocab_size,
        student_bytes=4,
        teacher_bytes=4,
        lock_step=False,
        architecture=family.architecture,
    )
    first_gradient = target_rows * student.model.config.vocab_size * 4
    saved -= made_in_forward(student)
    assert ROWS * (predicted.student + predicted.losses - first_gradient) == pytest.approx(saved, rel=0.01)
    assert ROWS * predicted.teacher == pytest.approx(held, rel=1e-9)
