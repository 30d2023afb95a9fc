"""Checkpoints of encoders as they are published: with their head, of the encoder alone, of another head."""

from __future__ import annotations

import pytest
from families.cases import CASES, make_model
from transformers import AutoModel, ElectraForPreTraining

from homodistil.api import _job, _with_size
from homodistil.distill.teacher import has_lm_head
from homodistil.models import FAMILIES
from homodistil.models.encoders.post_norm import PostNormEncoder

MODEL_TYPES = [model_type for model_type, family in FAMILIES.items() if isinstance(family, PostNormEncoder)]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_encoder_alone_is_a_teacher_without_a_head(model_type, tmp_path):
    """Its tensors have no prefix, and a pooler that the language model has no use for."""
    said = []
    make_model(model_type).save_pretrained(tmp_path / "whole")
    assert has_lm_head(str(tmp_path / "whole"), say=said.append)
    AutoModel.from_config(CASES[model_type].make_config()).save_pretrained(tmp_path / "alone")
    assert not has_lm_head(str(tmp_path / "alone"), say=said.append)
    assert said == []


def test_a_discriminator_is_a_teacher_without_a_head(tmp_path):
    said = []
    ElectraForPreTraining(CASES["electra"].make_config()).save_pretrained(tmp_path)
    assert not has_lm_head(str(tmp_path), say=said.append) and said == []


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_size_that_is_left_open_is_half_of_any_configuration(model_type, tmp_path):
    CASES[model_type].make_config().save_pretrained(tmp_path)
    fields = {"teacher.name": str(tmp_path)}
    student = _with_size(_job(None, None, fields), None, None, fields).config.student
    assert (student.hidden_size, student.intermediate_size, student.num_attention_heads) == (15, 22, 5)
