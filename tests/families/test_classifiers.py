"""Heads of labels of every family that has them: the stock class's logits, cut, exported, and compensated."""

from __future__ import annotations

import copy

import pytest
import torch
from families.cases import CASES, VOCABULARY, batch_of, token_ids
from support.small import random_keep
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from homodistil.config.schema import LossConfig
from homodistil.data.batch import Batch
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.export.stock_model import stock_model
from homodistil.models import FAMILIES, family_of
from homodistil.models.activations import attention_implementation
from homodistil.models.axes import Keep
from homodistil.models.family import ModelFamily
from homodistil.models.resize_plan import make_plan, slice_module
from homodistil.models.shapes import target_widths
from homodistil.models.stock_shape import Shape
from homodistil.pruning.compensation import Options, compensate
from homodistil.pruning.compensation.labels import logit_distance, mean_distance

MODEL_TYPES = sorted(name for name, family in FAMILIES.items() if family.has_classifiers)
COMPENSABLE = [name for name in MODEL_TYPES if family_of(name).refit_obstacle(CASES[name].make_config()) is None]
LABELS = 3
TARGET = {"modernbert": Shape(24, 31, 3)}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def make_classifier(model_type: str, **more: object) -> nn.Module:
    """With weights far from their initial ones, in evaluation mode."""
    config = CASES[model_type].make_config()
    for name, value in ({"num_labels": LABELS} | more).items():
        setattr(config, name, value)
    config._attn_implementation = attention_implementation(family_of(model_type))
    torch.manual_seed(0)
    model = family_of(model_type).empty(config, "classifier")
    for name, parameter in model.named_parameters():
        is_gamma = "norm" in name.lower() and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(is_gamma), std=0.3)
    return model.eval()


def padded_batch(num_texts: int = 3, seed: int = 0, with_types: bool = True) -> Batch:
    """Texts of several lengths, the second part of each of type 1."""
    ids = token_ids(num_texts, seed)
    batch = batch_of(ids)
    for i in range(num_texts):
        batch.attention_mask[i, ids.shape[1] - 2 * (i % 4) :] = 0
    types = torch.zeros_like(ids)
    types[:, 4:] = batch.attention_mask[:, 4:]
    rows = batch.attention_mask.flatten().nonzero().squeeze(1)
    return batch._replace(token_index=rows, token_types=types if with_types else None)


def stock_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Of the class's own forward pass, with the library's own attention."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    takes_types = family_of(model.config.model_type).has_token_types(model.config)
    types = {"token_type_ids": batch.token_types} if takes_types and batch.token_types is not None else {}
    with torch.no_grad():
        return model(batch.input_ids, attention_mask=batch.attention_mask, **types).logits


def loss() -> LossConfig:
    return LossConfig().only(scores_kl=1.0, hidden=1.0)


def cut_student(model_type: str) -> Student:
    """A copy, cut by random selection; `classifier` by another one than the residual stream."""
    student = Student(make_classifier(model_type), loss())
    keep = cut(student, TARGET.get(model_type))
    assert not torch.equal(keep["classifier"], keep["hidden"])
    return student.eval()


def cut(student: Student, shape: Shape | None) -> Keep:
    """What a random selection has left of `student`."""
    table = student.axis_table()
    target = target_widths(shape or Shape(16, 20, 4), table.widths, None, student.family.whole_heads)
    keep = random_keep(table, {axis: width for axis, width in target.items() if width < table.widths[axis]}, seed=5)
    slice_module(student, make_plan(table, keep))
    student.after_resize(keep)
    return keep


def test_the_families_that_have_them():
    expected = ["bert", "camembert", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta"]
    assert expected == MODEL_TYPES


@pytest.mark.parametrize("lock_step", [True, False])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_are_the_stock_classes(model_type, lock_step):
    model, batch = make_classifier(model_type), padded_batch()
    expected = stock_logits(model, batch)
    student, teacher = Student(copy.deepcopy(model), loss()), Teacher(model, lock_step)
    torch.testing.assert_close(student.scores(batch), expected, **CLOSE)
    torch.testing.assert_close(teacher.scores(batch), expected, **CLOSE)
    assert abs(student(batch, teacher(batch)).terms["scores_kl"]) < 1e-6
    without_types = stock_logits(model, batch._replace(token_types=None))
    takes_types = student.family.has_token_types(model.config)
    assert torch.allclose(without_types, expected) != takes_types


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_modernbert_pools_as_its_config_says(pooling):
    model, batch = make_classifier("modernbert", classifier_pooling=pooling), padded_batch()
    torch.testing.assert_close(Teacher(model).scores(batch), stock_logits(model, batch), **CLOSE)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_parameter_is_named_and_follows_a_cut(model_type):
    model, family = make_classifier(model_type), family_of(model_type)
    table, shapes = family.axis_table(model), {name: p.shape for name, p in model.named_parameters()}
    assert table.widths["classifier"] == table.widths["hidden"]
    unnamed = shapes.keys() - {use.parameter for use in table.uses}
    assert len(unnamed) == 1 and shapes[unnamed.pop()] == (LABELS,) or model_type == "mpnet"
    assert all(shapes[name][dim] == size for (name, dim), size in table.dim_sizes().items())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_cut_student_is_exported_as_the_stock_class(model_type, tmp_path):
    """The same logits and the same names of labels, in the same order."""
    names = {0: "zero", 1: "one", 2: "two"}
    student, batch = cut_student(model_type), padded_batch()
    config = CASES[model_type].make_config()
    config.id2label, config.label2id = names, {name: i for i, name in names.items()}
    weights = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    stock_model(weights, student, config).save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(stock_logits(loaded, batch), student.scores(batch), **CLOSE)
    assert loaded.config.id2label == names and loaded.config.label2id == config.label2id
    assert loaded.config.architectures == [type(loaded).__name__] and len(loaded.config.id2label) == LABELS


def compensated(model_type: str, widths: dict[str, int], kind: str, **options) -> tuple[float, float]:
    """`distances_of_a_cut` on texts that nothing was fitted to."""
    batches = [padded_batch(24, seed) for seed in range(6)], [padded_batch(24, 90)]
    return distances_of_a_cut(make_classifier(model_type), family_of(model_type), widths, kind, *batches, **options)


def distances_of_a_cut(
    model: nn.Module, family: ModelFamily, widths: dict[str, int], kind: str, fitted_to: list, fresh: list, **options
) -> tuple[float, float]:
    """Distance of the logits on `fresh`: of the plain selection, and compensated."""
    table = family.axis_table(model)
    keep = random_keep(table, widths)
    plain = copy.deepcopy(model)
    slice_module(plain, plan := make_plan(table, keep))
    family.refresh(plain, plan.widths_after)
    new = compensate(model, family, table, keep, fitted_to, Options(logits=kind, **options)).model
    before, after = (logit_distance((model, other), family, fresh, kind) for other in (plain, new))
    return mean_distance(before, kind), mean_distance(after, kind)


@pytest.mark.parametrize("kind", ["categories", "values"])
@pytest.mark.parametrize("mode", ["refit", "full"])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert"])
def test_a_compensated_cut_is_nearer(model_type, mode, kind):
    """On other texts. Weights are random, so that a third of the dims is a loss that nothing makes up for wholly."""
    widths = {"hidden": 20 if model_type != "modernbert" else 32, "classifier": 22, "layer.0.ffn": 30}
    before, after = compensated(model_type, widths, kind, mode=mode)
    assert after < (0.97 if mode == "refit" else 0.85) * before


def test_a_rotation_that_nothing_prevents_changes_no_logit():
    """ModernBERT's gains can be folded, that of the final norm into the head's own linear; only that of the embeddings'
    norm has nowhere to go, and is alike in all dims here."""
    family, model = family_of("modernbert"), make_classifier("modernbert")
    torch.nn.init.constant_(model.model.embeddings.norm.weight, 1.5)
    table, batches = family.axis_table(model), [padded_batch(24, seed) for seed in range(6)]
    keep = {"hidden": torch.arange(table.widths["hidden"])}
    new = compensate(model, family, table, keep, batches, Options(logits="categories", ridge=1e-6)).model
    assert mean_distance(logit_distance((model, new), family, batches, "categories"), "categories") < 1e-5


def test_distances_of_logits():
    """Against loops over texts."""
    family, models = family_of("bert"), (make_classifier("bert"), make_classifier("bert"))
    with torch.no_grad():
        models[1].classifier.weight.mul_(0.5)
    batches = [padded_batch(5, seed) for seed in range(2)]
    before, after = (torch.cat([stock_logits(m, b) for b in batches]).double() for m in models)
    divergence = sum(
        (p.exp() * (p - q)).sum()
        for p, q in zip(before.log_softmax(-1), functional.log_softmax(after, -1), strict=True)
    )
    assert mean_distance(logit_distance(models, family, batches, "categories"), "categories") == pytest.approx(
        float(divergence / 10), rel=1e-4
    )
    share = (before - after).square().sum() / (before - before.mean()).square().sum()
    assert mean_distance(logit_distance(models, family, batches, "values"), "values") == pytest.approx(
        float(share), rel=1e-4
    )
    assert VOCABULARY > 5
