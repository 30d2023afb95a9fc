"""Embeddings that a class multiplies with a number of its width: the teacher's in training, its own in exports."""

from __future__ import annotations

import copy

import pytest
import torch
from families.cases import make_model, token_ids

from homodistil.models import family_of

WIDER = 2.0
"""By how much the embeddings of the trained model are multiplied more."""


@pytest.mark.parametrize("model_type", ["gemma", "gemma3_text"])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_the_scale_of_training_is_folded_into_the_stock_model(is_tied, model_type):
    stock, family, ids = make_model(model_type), family_of(model_type), token_ids()
    if not is_tied:
        stock.lm_head.weight = torch.nn.Parameter(stock.lm_head.weight.detach().flip(0))
    trained = copy.deepcopy(stock)
    embeddings = family.embeddings(trained)
    embeddings.scalar_embed_scale *= WIDER
    embeddings.embed_scale *= WIDER
    with torch.no_grad():
        expected, before = trained(input_ids=ids).logits, stock(input_ids=ids).logits
        family.fold_embedding_scale(stock, trained)
        torch.testing.assert_close(stock(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-2)
