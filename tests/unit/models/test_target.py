"""Presets against the paper's table, and shapes that cannot be cut from the teacher."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from homodistil.config.schema import StudentConfig
from homodistil.errors import UserError
from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.shapes import PRESETS, Shape, half_of, target_shape, target_widths

BERT_BASE = BertConfig()  # Hugging Face's defaults are bert-base-uncased

# Weights only, millions: (word embedding, backbone, sum), design section 6.
TABLE = {
    "homobert-base": (17.58, 47.78, 65.4),
    "homobert-small": (7.81, 9.44, 17.3),
    "homobert-xsmall": (7.33, 8.29, 15.6),
    "homobert-tiny": (6.84, 7.23, 14.1),
}


def _teacher_widths():
    with torch.device("meta"):
        return bert.axis_table(BertForMaskedLM(BERT_BASE)).widths


@pytest.mark.parametrize("preset", TABLE)
def test_presets_have_the_papers_sizes(preset):
    widths = target_widths(target_shape(StudentConfig(preset=preset), _teacher_widths()), _teacher_widths())
    with torch.device("meta"):
        model = BertForMaskedLM(bert.student_config(BERT_BASE, widths))
    weights = {name: p.numel() / 1e6 for name, p in model.named_parameters() if p.ndim == 2}
    embedding = weights["bert.embeddings.word_embeddings.weight"]
    backbone = sum(millions for name, millions in weights.items() if "encoder.layer" in name)
    expected = TABLE[preset]
    assert embedding == pytest.approx(expected[0], abs=0.005)
    assert backbone == pytest.approx(expected[1], abs=0.005)
    # The table's sum counts biases and LayerNorm of the backbone in the base row only; 0.1 M covers them.
    assert embedding + backbone == pytest.approx(expected[2], abs=0.1)


def test_every_preset_can_be_expressed_by_a_stock_config():
    for shape in PRESETS.values():
        assert shape.hidden_size % shape.num_attention_heads == 0


@pytest.mark.parametrize(
    "student, message",
    [
        (StudentConfig(preset="homobert-base", hidden_size=1024), "student.hidden_size: found 1024.*768"),
        (StudentConfig(preset="homobert-base", intermediate_size=4096), "student.intermediate_size: found 4096"),
        (StudentConfig(preset="homobert-base", num_attention_heads=16), "student.num_attention_heads: found 16"),
        (StudentConfig(preset="homobert-small", hidden_size=250), "250 is not divisible by .* 8"),
        (StudentConfig(preset="homobert-base", num_attention_heads=6), "96 wide, the teacher's 64; use at least 9"),
        (
            StudentConfig(hidden_size=64, num_attention_heads=2),
            "student.intermediate_size: not set beside hidden_size=64, num_attention_heads=2.*"
            "is student.intermediate_size=1536 ",
        ),
        (
            StudentConfig(intermediate_size=64),
            "student.hidden_size, student.num_attention_heads: not set .* student.hidden_size=384 student.num_att",
        ),
        (
            StudentConfig(),
            "student: no target size; for half of this teacher's width set student.hidden_size=384 "
            r"student.intermediate_size=1536 student.num_attention_heads=6 \(or student.preset=NAME: teacher, quick",
        ),
    ],
)
def test_impossible_shapes_name_the_field(student, message):
    with pytest.raises(UserError, match=message):
        target_widths(target_shape(student, _teacher_widths()), _teacher_widths())


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("head_dim", [1, 2, 7, 64])
def test_the_proposed_half_can_be_cut_from_its_teacher(heads, head_dim):
    teacher = Shape(heads * head_dim, 2 * head_dim, heads)
    half = half_of(teacher)
    widths = {"hidden": teacher.hidden_size, "layer.0.ffn": teacher.intermediate_size, "layer.0.heads": heads}
    widths |= {"layer.0.qk_dim": head_dim, "layer.0.vo_dim": head_dim}
    assert target_widths(half, widths)["hidden"] == half.hidden_size
    assert half.hidden_size <= max(1, teacher.hidden_size // 2) and half.hidden_size >= teacher.hidden_size // 3


def test_half_of_a_teacher_of_even_sizes_is_half_of_everything():
    assert half_of(Shape(384, 1536, 12)) == Shape(192, 768, 6)
    assert half_of(Shape(128, 512, 2)) == Shape(64, 256, 1)


def test_fields_override_the_preset():
    student = StudentConfig(preset="homobert-small", hidden_size=128)
    assert target_shape(student, _teacher_widths()) == Shape(128, 1024, 8)
