"""Sizes by fraction or by number of parameters, and what is refused of a decoder before anything is loaded."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from homodistil.config.rules import check
from homodistil.config.schema import RunConfig
from homodistil.errors import UserError
from homodistil.models import REFUSED, family_of
from homodistil.models.config_file import check_values
from homodistil.models.shapes import target_widths
from homodistil.models.size_search import find_shape
from homodistil.models.stock_shape import Shape
from homodistil.training.resolve import resolve_run

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def _table(config):
    family = family_of(config.model_type)
    with torch.device("meta"):
        model = family.empty_model(config)
    return family, family.axis_table(model), {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("size", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("kind", [BertConfig, GPT2Config, LlamaConfig, Qwen2Config, Gemma3TextConfig])
def test_the_count_is_the_stock_models_and_near_what_was_wanted(kind, size):
    config = kind() if kind in (BertConfig, GPT2Config) else kind(**SMOLLM2)
    family, table, shapes = _table(config)
    whole = sum(int(torch.tensor(shape).prod()) for shape in shapes.values())
    shape, parameters = find_shape(table, shapes, size * whole, "student.size")
    assert parameters == pytest.approx(size * whole, rel=0.1)
    assert shape.hidden_size % 64 == 0 and shape.intermediate_size % 64 == 0
    with torch.device("meta"):
        student = family.empty_model(family.student_config(config, target_widths(shape, table.widths)))
    assert sum(p.numel() for p in student.parameters()) == parameters


def test_a_size_that_widths_do_not_reach():
    _, table, shapes = _table(LlamaConfig(**SMOLLM2))
    for wanted in (1e5, 1e9):
        with pytest.raises(UserError, match=r"^student.parameters: [\d,]+ parameters are wanted, the teacher has 134"):
            find_shape(table, shapes, wanted, "student.parameters")


def test_a_run_resolves_to_the_size():
    config = RunConfig()
    config.student.size, config.pruning.compensation, config.pruning.schedule = 0.5, "none", "one_shot"
    resolved = resolve_run(config, LlamaConfig(**SMOLLM2 | {"num_hidden_layers": 2}))
    assert resolved.target["hidden"] < 576 and resolved.target["layer.1.qk_dim"] == 64


@pytest.mark.parametrize(
    ("shape", "groups", "message"),
    [
        (Shape(36, 44, 5), None, r"student.num_attention_heads: found 5 .* 3 groups of 2 .* allowed .* 1, 2, 3, 4, 6$"),
        (Shape(36, 44, 4), 3, r"student.num_key_value_heads: found 3 \(with num_attention_heads 4\).* are 3, 6$"),
        (Shape(36, 44, 7), None, r"student.num_attention_heads: found 7, the teacher has 6"),
        (Shape(37, 44, 6), None, r"student.hidden_size: found 37, the teacher has 36"),
    ],
)
def test_heads_that_do_not_fit_their_groups(shape, groups, message):
    widths = {"hidden": 36, "layer.0.ffn": 44, "layer.0.kv_heads": 3, "layer.0.heads_in_group": 2}
    with pytest.raises(UserError, match=message):
        target_widths(shape, widths | {"layer.0.qk_dim": 8, "layer.0.vo_dim": 8}, groups)


def test_heads_of_their_own_have_no_groups():
    widths = {"hidden": 36, "layer.0.ffn": 44, "layer.0.heads": 3, "layer.0.qk_dim": 12, "layer.0.vo_dim": 12}
    with pytest.raises(UserError, match="student.num_key_value_heads: found 2, but every head"):
        target_widths(Shape(24, 44, 3), widths, 2)


def test_a_hidden_size_that_llama_refuses_is_a_mistral():
    config = LlamaConfig(**SMOLLM2 | {"num_hidden_layers": 1})
    family, table, _ = _table(config)
    student = family.student_config(config, target_widths(Shape(500, 1000, 6), table.widths))
    assert isinstance(student, MistralConfig) and student.sliding_window is None and student.hidden_size == 500


def test_a_window_that_hides_tokens_is_the_longest_text():
    family = family_of("mistral")
    sizes = SMOLLM2 | {"max_position_embeddings": 512}
    assert family.shape(MistralConfig(**sizes, sliding_window=128)).max_tokens == 128
    assert family.shape(MistralConfig(**sizes, sliding_window=None)).max_tokens == 512
    assert family.shape(Qwen2Config(**sizes, use_sliding_window=False)).max_tokens == 512


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_known_architectures_are_refused_by_name(model_type):
    with pytest.raises(UserError, match=rf"^teacher.name: architecture '{model_type}' cannot be cut: .*; give "):
        family_of(model_type)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_key_value_heads": 2}, "num_attention_heads 9 with num_key_value_heads 2, which does not divide it"),
        ({"head_dim": -1}, "found head_dim -1, allowed are whole numbers"),
        ({"num_key_value_heads": 0}, "found num_key_value_heads 0, allowed are whole numbers"),
        ({"num_key_value_heads": "3"}, "found num_key_value_heads '3', allowed are whole numbers"),
        ({"rms_norm_eps": 0}, "found rms_norm_eps 0, allowed are numbers > 0; set 1e-06, say"),
        ({"attention_dropout": 2}, "found attention_dropout 2, allowed"),
        ({"rope_parameters": {"rope_type": "nope"}}, "found rope_type 'nope', allowed are default, linear, "),
        ({"rope_parameters": {"full_attention": {"rope_theta": -1}}}, "found rope_theta -1, allowed are numbers > 0"),
        ({"rope_theta": "10000"}, "found rope_theta '10000', allowed are numbers > 0"),
        ({"auto_map": {"AutoConfig": "x.Y"}}, "found auto_map"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_decoders_config_that_no_run_could_use(values, message):
    content = SMOLLM2 | {"model_type": "llama"} | values
    with pytest.raises(UserError, match=message):
        check_values(content, "teacher.name: config.json")


def test_a_gemma_that_is_not_computed_as_it_was_trained():
    for name, value in (("final_logit_softcapping", 30.0), ("use_bidirectional_attention", True)):
        content = SMOLLM2 | {"model_type": "gemma3_text", name: value}
        with pytest.raises(UserError, match=rf"^teacher.name: config.json: found {name} {value}, allowed is .*; give"):
            check_values(content, "teacher.name: config.json")
        check_values(content | {name: None}, "teacher.name: config.json")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_head": 5}, "found n_embd 48 with n_head 5, which does not divide it"),
        ({"n_layer": 0}, "found n_layer 0, allowed are whole numbers 1"),
        ({"n_inner": -4}, "found n_inner -4, allowed are whole numbers 1"),
        ({"activation_function": "gelo"}, "found activation_function 'gelo', which is no activation"),
        ({"embd_pdrop": 2.0}, r"found embd_pdrop 2.0, allowed \[0, 1\)"),
        ({"layer_norm_epsilon": 0}, "found layer_norm_epsilon 0, allowed are numbers > 0"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "found scale_attn_by_inverse_layer_idx True, allowed is false: the",
        ),
        ({"scale_attn_weights": False}, "found scale_attn_weights False, allowed is true: the softmax scale"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_gpt2s_config_in_its_own_names(values, message):
    content = {"model_type": "gpt2", "n_embd": 48, "n_head": 6, "n_layer": 2, "n_inner": None}
    check_values(content, "teacher.name: config.json")
    with pytest.raises(UserError, match=f"^teacher.name: config.json: {message}"):
        check_values(content | values, "teacher.name: config.json")


def test_one_way_to_say_a_size():
    config = RunConfig()
    config.student.size, config.student.hidden_size = 0.5, 64
    with pytest.raises(UserError, match="student.size: found 0.5 beside student.hidden_size"):
        check(config)


@pytest.mark.parametrize("kind", [BertConfig, LlamaConfig, Gemma3TextConfig])
def test_a_size_beside_fewer_layers(kind):
    """What the stock model of that depth has, near the size that is wanted of all; the widths are larger instead."""
    teacher = BertConfig() if kind is BertConfig else kind(**SMOLLM2)
    config = RunConfig()
    config.student.size = 0.4
    deep = resolve_run(config, teacher)
    config.student.num_hidden_layers = teacher.num_hidden_layers // 2
    resolved = resolve_run(config, teacher)
    family = resolved.family
    with torch.device("meta"):
        student = family.empty_model(family.student_config(teacher, resolved.target))
    assert student.config.num_hidden_layers == teacher.num_hidden_layers // 2
    assert sum(p.numel() for p in student.parameters()) == pytest.approx(0.4 * resolved.teacher_parameters, rel=0.1)
    assert student.config.hidden_size > deep.target["hidden"]


def test_a_size_that_fewer_layers_do_not_reach():
    config = RunConfig()
    config.student.size, config.student.num_hidden_layers = 0.9, 3
    said = r"^student.size: 98,[\d,]+ parameters are wanted, the teacher with 3 of its 12 layers has 4[\d,]+; narrower"
    with pytest.raises(UserError, match=said):
        resolve_run(config, BertConfig())
