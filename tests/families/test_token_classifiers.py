"""Token classifiers of every family that has them: the stock class's logits, cut, exported, and compensated."""

from __future__ import annotations

import copy

import pytest
import torch
from families.cases import CASES, batch_of, token_ids
from families.test_classifiers import (
    CLOSE,
    LABELS,
    MODEL_TYPES,
    TARGET,
    cut,
    distances_of_a_cut,
    loss,
    make_classifier,
    stock_logits,
)
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification

from homodistil.data.batch import Batch
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.export.stock_model import stock_model
from homodistil.models import family_of

ARCHITECTURE = ["AnyForTokenClassification"]


def make_token_classifier(model_type: str) -> nn.Module:
    return make_classifier(model_type, architectures=ARCHITECTURE)


def framed_batch(num_texts: int = 3, seed: int = 0) -> Batch:
    """Texts of several lengths, of which all but the first and last token count."""
    ids = token_ids(num_texts, seed)
    lengths = torch.tensor([ids.shape[1] - 2 * (i % 4) for i in range(num_texts)])[:, None]
    places = torch.arange(ids.shape[1])
    mask, counted = (places < lengths).long(), (places > 0) & (places < lengths - 1)
    index, valid = (where.flatten().nonzero().squeeze(1) for where in (counted, mask))
    batch = batch_of(ids)
    counts = batch.counts._replace(target_rows=float(len(index)), tokens=float(len(valid)))
    return batch._replace(attention_mask=mask, target_index=index, token_index=valid, counts=counts)


def stock_rows(model: nn.Module, batch: Batch) -> Tensor:
    """Of the tokens that count."""
    return stock_logits(model, batch).flatten(0, 1)[batch.target_index]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_are_the_stock_classes_before_a_cut_and_after_export(model_type, tmp_path):
    """The same logits and the same names of labels, in the same order; every parameter follows the cut."""
    model, batch = make_token_classifier(model_type), framed_batch()
    expected = stock_rows(model, batch)
    student, names = Student(copy.deepcopy(model), loss()), {0: "O", 1: "B", 2: "I"}
    assert expected.shape == (len(batch.target_index), LABELS)
    for lock_step in (True, False):
        teacher = Teacher(copy.deepcopy(model), lock_step)
        torch.testing.assert_close(teacher.scores(batch), expected, **CLOSE)
        assert abs(student(batch, teacher(batch)).terms["scores_kl"]) < 1e-6
    assert ("classifier" in student.axis_table().widths) == (model_type == "modernbert")
    cut(student, TARGET.get(model_type))
    config = CASES[model_type].make_config()
    config.architectures = ARCHITECTURE
    config.id2label, config.label2id = names, {name: i for i, name in names.items()}
    weights = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    stock_model(weights, student, config).save_pretrained(tmp_path)
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(stock_rows(loaded, batch), student.scores(batch), **CLOSE)
    assert loaded.config.id2label == names and loaded.config.label2id == config.label2id
    assert loaded.config.architectures == [type(loaded).__name__]


@pytest.mark.parametrize(("model_type", "kind"), [("bert", "categories"), ("modernbert", "values")])
@pytest.mark.parametrize("mode", ["refit", "full"])
def test_a_compensated_cut_is_nearer(model_type, kind, mode):
    """On other texts. Weights are random, so that a third of the dims is a loss that nothing makes up for wholly."""
    widths = {"hidden": 20 if model_type != "modernbert" else 32, "layer.0.ffn": 30}
    fitted_to, fresh = [framed_batch(6, seed) for seed in range(4)], [framed_batch(24, 90)]
    model = make_token_classifier(model_type)
    before, after = distances_of_a_cut(model, family_of(model_type), widths, kind, fitted_to, fresh, mode=mode)
    assert after < (0.9 if mode == "refit" else 0.7) * before
