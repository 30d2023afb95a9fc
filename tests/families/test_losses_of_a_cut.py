"""What a cut without any training does to the loss of every family, with the defaults that settle for it.

A term that is a thousand times another decides alone under gradient clipping, and in importance. The configurations are
those of cases.py, so that a new family is held to it without a change here.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from families.cases import CASES, LAYERS, batch_of, make_model, token_ids
from families.test_conformance import cut_to
from torch import nn

from homodistil.config.schema import LossConfig
from homodistil.distill.losses.settled import settled
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.models import family_of
from homodistil.models.shapes import target_widths
from homodistil.models.stock_shape import Shape, shape_of

MODEL_TYPES = sorted(CASES)
MOST_RATIO = 1000
DIM, FACTOR = 7, 1e3
"""A massive activation: one dim of what the MLP of the first layer puts out, and what it is multiplied with."""


def half_of_hidden(model_type: str) -> dict[str, int]:
    """Widths with half of the residual stream, and with it of the heads where it consists of whole ones."""
    family, widths = family_of(model_type), family_of(model_type).axis_table(make_model(model_type)).widths
    shape = shape_of(widths)
    if not family.whole_heads:
        return {"hidden": shape.hidden_size // 2}
    heads = shape.num_attention_heads // 2
    hidden = shape.hidden_size // shape.num_attention_heads * heads
    return target_widths(Shape(hidden, shape.intermediate_size, heads), widths, whole_heads=True)


def weighted(student: Student, teacher: nn.Module) -> dict[str, float]:
    """Term -> weight x value."""
    batch = batch_of(token_ids())
    with torch.no_grad():
        terms = student(batch, Teacher(teacher)(batch)).terms
    return {name: weight * float(terms[name]) for name, weight in student.objective.weights.items()}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_no_term_is_a_thousand_times_another(model_type):
    student = cut_to(model_type, half_of_hidden(model_type))
    values = weighted(student, make_model(model_type))
    assert values.keys() == {"mlm", "kl", "hidden", "attention", "embedding"}
    assert 0 < max(values.values()) < MOST_RATIO * min(values.values()), values


@pytest.mark.parametrize("projection", ["student", "teacher"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_normalised_states_are_bounded(model_type, projection):
    """Rows of mean square 1 are at most 2 apart in each dim, on average."""
    loss = LossConfig(hidden_space="normalised", projection=projection)
    student = cut_to(model_type, half_of_hidden(model_type), loss)
    values = weighted(student, make_model(model_type))
    assert 0 < values["hidden"] <= 4 * LAYERS
    assert 0 <= values["embedding"] <= 4  # 0 where W selects what the student has left of a table


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_defaults_follow_from_norms_and_masks(model_type):
    architecture = family_of(model_type).architecture
    loss = settled(LossConfig(), architecture)
    pre_norm = {"modernbert", "gpt2", "llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3"}
    pre_norm |= {"gemma", "gemma3_text", "olmo2"}
    assert loss.hidden_space == ("normalised" if model_type in pre_norm else "raw")
    is_decoder = model_type in pre_norm - {"modernbert"}
    assert loss.attention_target == ("probabilities_kl" if is_decoder else "scores")
    given = LossConfig(hidden_space="raw", attention_target="centred_scores")
    assert settled(given, architecture) == given
    assert Student(make_model(model_type), LossConfig()).objective.config == loss


@pytest.mark.parametrize("is_kept", [False, True], ids=["cut away", "kept"])
def test_a_massive_activation_decides_raw_states_and_no_others(is_kept):
    teacher = make_model("llama")
    with torch.no_grad():
        teacher.model.layers[0].mlp.down_proj.weight[DIM] *= FACTOR
    kept = torch.tensor([i for i in range(1, 36, 2) if i != DIM] + ([DIM] if is_kept else [])).sort().values
    values = {}
    for space in ("raw", "normalised"):
        loss = dataclasses.replace(LossConfig(), hidden_space=space)
        student = cut_to("llama", {}, loss, model=copy.deepcopy(teacher), keep={"hidden": kept})
        values[space] = weighted(student, teacher)
    raw, normalised = (values[space] for space in ("raw", "normalised"))
    assert raw["hidden"] > MOST_RATIO * raw["kl"]
    assert normalised["hidden"] <= 4 * LAYERS
    assert max(normalised.values()) < MOST_RATIO * min(normalised.values()), normalised
    assert raw["kl"] == normalised["kl"]
