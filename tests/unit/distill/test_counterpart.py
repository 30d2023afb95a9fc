"""How a student may start: layer maps, fresh weights, and what is refused."""

import copy
from fractions import Fraction

import pytest
import torch
from support.small import VOCABULARY, plain_run, small_batch, small_model
from support.tiny_decoder import make_decoder
from transformers import BertConfig, Qwen2Config

from homodistil.config.schema import RunConfig, StudentConfig
from homodistil.distill.layer_map import check_student, compared_layers, copied_layers
from homodistil.distill.losses.active import check_terms
from homodistil.distill.teacher import Teacher
from homodistil.errors import UserError
from homodistil.export.stock_model import stock_model
from homodistil.models.activations import ATTENTION
from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.shapes import student_widths
from homodistil.training.resolve import resolve_run

TEACHER = {"num_hidden_layers": 6}


def config_of(**changes) -> RunConfig:
    """`student__init="random"` sets student.init."""
    config = plain_run()
    student = config.student
    student.hidden_size, student.intermediate_size, student.num_attention_heads = 15, 20, 3
    for name, value in changes.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    return config


def student_of(config: RunConfig):
    teacher = small_model(**TEACHER)
    return resolve_run(config, teacher.config).build_student(lambda: small_model(**TEACHER)), teacher


RANDOM = {"student__init": "random", "pruning__schedule": "none"}


INFLUENCE = {"student__layer_choice": "influence", "student__num_hidden_layers": 3}
LEAVING = {"pruning__depth_schedule": "linear", "student__num_hidden_layers": 3}


def test_layers_are_compared_uniformly():
    assert compared_layers(StudentConfig(num_hidden_layers=4), 12) == (2, 5, 8, 11)  # TinyBERT_4
    assert compared_layers(StudentConfig(num_hidden_layers=6), 12) == (1, 3, 5, 7, 9, 11)
    assert compared_layers(StudentConfig(), 3) == (0, 1, 2)
    assert copied_layers(StudentConfig(num_hidden_layers=6), 12) == (0, 2, 4, 6, 8, 10)
    published = [0, 2, 4, 7, 9, 11]  # DistilBERT's script
    assert copied_layers(StudentConfig(num_hidden_layers=6, init_layers=published), 12) == tuple(published)


def nearest_layers(num_layers: int, num_teacher_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(compared, copied) by looking at every layer of the teacher; of two equally near ones the later."""

    def nearest(point: Fraction) -> int:
        return max(range(num_teacher_layers), key=lambda layer: (-abs(layer - point), layer))

    step = Fraction(num_teacher_layers, num_layers)
    return tuple(zip(*((nearest((m + 1) * step - 1), nearest(m * step)) for m in range(num_layers)), strict=True))


def test_any_depth_up_to_the_teachers():
    for num_teacher_layers in range(1, 41):
        for num_layers in range(1, num_teacher_layers + 1):
            student = StudentConfig(num_hidden_layers=num_layers)
            compared, copied = (layers(student, num_teacher_layers) for layers in (compared_layers, copied_layers))
            assert (compared, copied) == nearest_layers(num_layers, num_teacher_layers)
            assert len(compared) == num_layers and list(compared) == sorted(set(compared))
            assert compared[-1] == num_teacher_layers - 1 and copied[0] == 0
            # Each student layer stands for a block of the teacher's: copied from its first, compared with its last.
            assert copied[1:] == tuple(layer + 1 for layer in compared[:-1])
            if num_teacher_layers % num_layers == 0:
                step = num_teacher_layers // num_layers
                assert compared == tuple(range(step - 1, num_teacher_layers, step))
                assert copied == tuple(range(0, num_teacher_layers, step))


def test_minitrons_depths():
    """32 -> 16 and 36 -> 24 layers (arXiv 2407.14679), the latter in blocks of two layers and of one by turns."""
    compared = compared_layers(StudentConfig(num_hidden_layers=24), 36)
    assert compared == tuple(layer for i in range(0, 36, 3) for layer in (i + 1, i + 2))
    assert compared_layers(StudentConfig(num_hidden_layers=16), 32) == tuple(range(1, 32, 2))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"student__num_hidden_layers": 0}, r"student.num_hidden_layers: found 0, the teacher has 6.*1 \.\. 6"),
        ({"student__num_hidden_layers": -1}, "student.num_hidden_layers: found -1"),
        ({"student__num_hidden_layers": 7}, r"student.num_hidden_layers: found 7, the teacher has 6.*1 \.\. 6"),
        ({"student__init_layers": [*range(7)], "student__num_hidden_layers": 7}, "num_hidden_layers: found 7"),
        ({"student__init_layers": [0, 3], "student__num_hidden_layers": 3}, r"student.init_layers: found \[0, 3\].*3 "),
        ({"student__init_layers": [3, 0], "student__num_hidden_layers": 2}, "ascending"),
        ({"student__init_layers": [0, 6], "student__num_hidden_layers": 2}, r"0 \.\. 5"),
        (
            {"student__init": "random", "pruning__schedule": "cubic"},
            "pruning.schedule: found cubic.*student.init=random",
        ),
        (RANDOM | {"student__init_layers": [0], "student__num_hidden_layers": 1}, "copies no layers"),
        (RANDOM | {"loss__projection_learned": False}, "loss.projection_learned: false"),
        (INFLUENCE | {"student__num_hidden_layers": 6}, "student.layer_choice: found influence.*keeps all 6 layers"),
        (RANDOM | INFLUENCE, "student.layer_choice: found influence.*student.init=random has its final layers"),
        (INFLUENCE | {"student__init_layers": [0, 1, 5]}, "student.init_layers: found .0, 1, 5. beside"),
        (LEAVING | {"student__num_hidden_layers": None}, "pruning.depth_schedule: found linear.*below 6"),
        (RANDOM | LEAVING, "pruning.depth_schedule: found linear.*=one_shot, or student.init=teacher"),
        (LEAVING | {"student__init_layers": [1, 2, 5]}, "student.init_layers: found .1, 2, 5..*begin with 0"),
        (LEAVING | {"pruning__schedule": "gap"}, "pruning.depth_schedule: found linear with pruning.schedule=gap"),
    ],
)
def test_impossible_starts_name_the_field(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        config = config_of(**changes)
        check_student(config.student, config.pruning, config.loss, 6)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, ok",
    [
        ({"relation_heads": 0}, False),  # the teacher's 4, and 15 dims
        ({"relation_heads": 3}, True),
        ({"relation_heads": 12}, False),
        ({"relation_heads": 3, "relation_layer": 6}, False),
        ({"relation_heads": 3, "relation_layer": -6}, True),
    ],
)
def test_relation_heads_share_all_dims_of_a_layer_equally(changes, ok):
    config = config_of(**{f"loss__{name}": value for name, value in changes.items()}, loss__relations=1.0, **RANDOM)
    widths = bert.axis_table(small_model(**TEACHER)).widths
    initial, _ = student_widths(config.student, widths)
    if ok:
        return check_terms(config.loss, widths, [initial])
    with pytest.raises(UserError, match="loss.relation_(heads|layer)"):
        check_terms(config.loss, widths, [initial])


def test_widths_on_the_way_are_looked_at_too():
    config = config_of(loss__relations=1.0, student__hidden_size=12, student__num_attention_heads=4)
    widths = bert.axis_table(small_model(**TEACHER)).widths
    config.loss.relation_heads = 8
    check_terms(config.loss, widths, [widths])  # 24 dims
    with pytest.raises(UserError, match="8 relation heads cannot share the 20 dims"):
        check_terms(config.loss, widths, [widths, {"layer.5.qk_dim": 5}])


def test_a_copy_of_some_layers_has_the_teachers_weights():
    student, teacher = student_of(config_of(student__num_hidden_layers=2, student__init_layers=[1, 4]))
    own, theirs = student.model.bert.encoder.layer, teacher.bert.encoder.layer
    assert len(own) == 2 and student.layer_map.layers == (2, 5) and student.widths["hidden"] == 24
    for layer, origin in zip(own, (theirs[1], theirs[4]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), origin.parameters(), strict=True))
    batch = small_batch()
    assert torch.isfinite(student(batch, Teacher(teacher)(batch)).total)


@pytest.mark.parametrize("lock_step", [True, False])
def test_a_depth_that_does_not_divide_the_teachers(lock_step):
    """4 layers of 6, each term against the teacher's own pass, whichever way the teacher runs."""
    config = config_of(student__num_hidden_layers=4, pruning__schedule="none", loss__hidden=1.0)
    student, teacher = student_of(config)
    layers, theirs = student.model.bert.encoder.layer, teacher.bert.encoder.layer
    assert student.layer_map.layers == (1, 2, 4, 5)
    for layer, origin in zip(layers, (theirs[0], theirs[2], theirs[3], theirs[5]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), origin.parameters(), strict=True))
    batch = small_batch()
    terms = student(batch, Teacher(teacher, lock_step=lock_step)(batch)).terms
    hidden = [hidden_states(model, batch) for model in (student.model, teacher)]
    for i, compared in enumerate((1, 2, 4, 5)):
        expected = (hidden[0][i + 1] - hidden[1][compared + 1])[batch.attention_mask.bool()].square().mean()
        torch.testing.assert_close(terms[f"hidden/layer.{i}"], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def hidden_states(model, batch) -> tuple[torch.Tensor, ...]:
    """What enters layer 0, and what each layer puts out, by the library."""
    return model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True).hidden_states


def test_an_export_keeps_the_kinds_of_the_layers_that_it_was_made_of():
    """Full and windowed layers: 3 of 4, by depth; the stock checkpoint sees what the student saw, beyond the window."""
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    window = {"layer_types": kinds, "use_sliding_window": True, "sliding_window": 8}
    teacher = make_decoder(Qwen2Config, num_hidden_layers=4, **window)
    config = config_of(student__preset="teacher", student__num_hidden_layers=3, pruning__schedule="none")
    config.student.hidden_size = config.student.intermediate_size = config.student.num_attention_heads = None
    load = copy.deepcopy(teacher)
    load.set_attn_implementation(ATTENTION)
    student = resolve_run(config, teacher.config).build_student(lambda: load)
    weights = {name: p.detach() for name, p in student.named_parameters()}
    stock = stock_model(weights, student, teacher.config)
    assert stock.config.layer_types == [kinds[0], kinds[1], kinds[3]] and student.layer_map.layers == (0, 2, 3)
    assert teacher.config.layer_types == kinds
    ids = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(stock(ids).logits, student.model(ids).logits, rtol=1e-5, atol=1e-5)


def test_fresh_weights_follow_the_seed_alone():
    config = config_of(**RANDOM)
    torch.manual_seed(1)
    first = student_of(config)[0].state_dict()
    torch.manual_seed(2)
    again = student_of(config)[0].state_dict()
    config.train.seed = 1
    other = student_of(config)[0].state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in ("model.bert.encoder.layer.0.output.dense.weight", "projections.layer_0.weight"):
        assert not torch.equal(first[name], other[name])


def test_a_random_student_has_rectangular_projections_and_its_own_scale():
    student, teacher = student_of(config_of(**RANDOM, loss__cosine=1.0, student__num_hidden_layers=3))
    assert {tuple(p.weight.shape) for p in student.projections.values()} == {(24, 15)}
    assert set(student.projections) == {"embedding", "layer_0", "layer_1", "layer_2", "last"}
    assert student.softmax_scale == pytest.approx(5**-0.5)
    assert student.pruned_heads(0, torch.device("cpu")).tolist() == [0, 1, 2]  # compared with the first heads
    batch = small_batch()
    student(batch, Teacher(teacher)(batch)).total.backward()
    assert all(p.grad is not None for p in student.parameters())


def test_equal_widths_for_the_whole_run_need_no_projection_for_the_cosine():
    kept = config_of(loss__cosine=1.0, student__preset="teacher", pruning__schedule="none")
    assert "last" not in student_of(kept)[0].projections
    pruned = student_of(config_of(loss__cosine=1.0))[0]
    assert torch.equal(pruned.projections["last"].weight, torch.eye(24))


@pytest.mark.parametrize("layers", [None, 2])
def test_a_random_student_exports_to_equal_stock_logits(layers):
    student, teacher = student_of(config_of(**RANDOM, student__num_hidden_layers=layers))
    weights = {name: p.detach() for name, p in student.named_parameters()}
    stock = stock_model(weights, student, teacher.config)
    assert isinstance(stock.config, BertConfig) and stock.config.num_hidden_layers == (layers or 6)
    assert (stock.config.hidden_size, stock.config.vocab_size) == (15, VOCABULARY)
    batch = small_batch()
    logits = stock(batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)[batch.target_index]
    torch.testing.assert_close(student.eval().predict(batch), logits, rtol=1e-5, atol=1e-6)


def test_the_teachers_size_by_name():
    config = config_of()
    config.student = StudentConfig(preset="teacher", num_hidden_layers=2, intermediate_size=20)
    initial, target = student_widths(config.student, bert.axis_table(small_model(**TEACHER)).widths)
    assert set(initial) == set(target) and "layer.1.ffn" in target and "layer.2.ffn" not in target
    assert (target["hidden"], target["layer.1.ffn"], initial["layer.1.ffn"]) == (24, 20, 40)
