"""Presets against the paper's table, and shapes that cannot be cut from the teacher."""

import pytest
import torch
from support.small import grouped_widths, plain_widths
from transformers import BertConfig, BertForMaskedLM

from homodistil.config.schema import StudentConfig
from homodistil.errors import UserError
from homodistil.models import family_of
from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.proposed_shapes import half_of, in_proportion
from homodistil.models.shapes import PRESETS, check_stock, target_shape, target_widths
from homodistil.models.stock_shape import Shape

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
            r"student.intermediate_size=1536 student.num_attention_heads=12 \(or student.preset=NAME: teacher, quick",
        ),
    ],
)
def test_impossible_shapes_name_the_field(student, message):
    with pytest.raises(UserError, match=message):
        target_widths(target_shape(student, _teacher_widths()), _teacher_widths())


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("head_dim", [1, 2, 7, 64])
def test_the_proposed_half_can_be_cut_from_its_teacher(heads, head_dim):
    teacher = plain_widths(heads * head_dim, 2 * head_dim, heads)
    half = half_of(teacher)
    assert target_widths(half, teacher)["hidden"] == half.hidden_size
    assert max(1, teacher["hidden"] // 2) >= half.hidden_size >= teacher["hidden"] // 3


@pytest.mark.parametrize(("groups", "in_group"), [(1, 4), (3, 3), (5, 1), (4, 3)])
@pytest.mark.parametrize("hidden", [35, 36, 640])
def test_the_proposed_sizes_of_grouped_heads_are_multiples_of_their_number(groups, in_group, hidden):
    teacher = grouped_widths(hidden, 80, groups, in_group, head_dim=8)
    for given in ({}, {"intermediate_size": 30}, {"hidden_size": hidden - 7}):
        shape = in_proportion({name: given.get(name) for name in Shape._fields}, teacher)
        check_stock(family_of("gemma3_text"), target_widths(shape, teacher), teacher)


def test_a_hidden_size_that_no_stock_class_holds_names_the_nearest():
    teacher = grouped_widths(48, 80, 3, 2, head_dim=8)
    target = target_widths(Shape(35, 40, 6), teacher)
    message = r"^student.hidden_size: found 35 with 6 heads, .* gemma3 .* nearest are 30 and 36 \(or set"
    with pytest.raises(UserError, match=message):
        check_stock(family_of("gemma3_text"), target, teacher)
    check_stock(family_of("llama"), target, teacher)  # Mistral's class holds it


def test_half_of_a_teacher_keeps_its_heads_where_they_can_get_narrower():
    assert half_of(plain_widths(384, 1536, 12)) == Shape(192, 768, 12)
    assert half_of(plain_widths(128, 512, 2)) == Shape(64, 256, 2)
    assert half_of(plain_widths(1020, 512, 12)).num_attention_heads == 10  # twelve do not divide 510
    assert half_of(plain_widths(384, 1536, 12), whole_heads=True) == Shape(192, 768, 6)
    assert half_of(grouped_widths(384, 1536, 4, 3, head_dim=32)).num_attention_heads == 6


def test_fields_override_the_preset():
    student = StudentConfig(preset="homobert-small", hidden_size=128)
    assert target_shape(student, _teacher_widths()) == Shape(128, 1024, 8)
