"""Compensated cuts of BERT's block under other names: BERT's weights in another class have to come out as BERT's do.

BERT's own numbers are held to a float64 reference in tests/unit/pruning/test_compensation.py.
"""

from __future__ import annotations

import pytest
import torch
from support.small import VOCABULARY, random_keep, small_batch, small_model
from torch import nn
from transformers import CONFIG_MAPPING

from homodistil.models import family_of
from homodistil.models.activations import ATTENTION
from homodistil.models.encoders.bert import BERT
from homodistil.models.family import ModelFamily
from homodistil.pruning.compensation import Compensated, Options, compensate

SIZES = {"hidden_size": 15, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 22}
BATCHES = [small_batch(seed, lengths) for seed, lengths in enumerate([(16, 11, 5), (13, 9)])]
WIDTHS = {"hidden": 10, "layer.0.ffn": 13, "layer.1.heads": 2}
WIDTHS |= {f"layer.{i}.{kind}": 3 for i in range(2) for kind in ("qk_dim", "vo_dim")}


def fresh_model(model_type: str) -> nn.Module:
    """Of the sizes of `bert_model`, without dropout, with tapped attention."""
    family = family_of(model_type)
    sizes = {family.field(name): size for name, size in SIZES.items()}
    sizes |= {"embedding_size": SIZES["hidden_size"]} if model_type == "electra" else {}
    config = CONFIG_MAPPING[model_type](vocab_size=VOCABULARY, pad_token_id=0, max_position_embeddings=20, **sizes)
    family.set_dropout(config, 0.0)
    config._attn_implementation = ATTENTION
    return family.empty_model(config).eval()


def bert_model() -> nn.Module:
    """Token types have no part in it, as some of the other classes have none."""
    model = small_model(**SIZES, max_position_embeddings=20).eval()
    torch.nn.init.zeros_(model.bert.embeddings.token_type_embeddings.weight)
    return model


def modules_of(model: nn.Module, family: ModelFamily) -> list[nn.Module]:
    """Linears and norms that compensation refits, in an order that all families share."""
    parts = [part for i in range(len(family.layers(model))) for part in family.modules(model, i)]
    layers = [part for part in parts if isinstance(part, nn.Linear | nn.LayerNorm)]
    head = family.head_parts(model)
    return [family.embedding_norm(model).module, *layers, head.linear, head.norm.module]


@torch.no_grad()
def transplanted(bert: nn.Module, model_type: str) -> nn.Module:
    """A model of `model_type` that computes what `bert` does."""
    model, family = fresh_model(model_type), family_of(model_type)
    for module, source in zip(modules_of(model, family), modules_of(bert, BERT), strict=True):
        module.load_state_dict(source.state_dict())
    for name, table in family.embeddings(model).named_children():
        if isinstance(table, nn.Embedding):
            table.weight.copy_(bert.bert.embeddings.get_submodule(name).weight[: len(table.weight)])
    family.decoder(model).bias.copy_(bert.cls.predictions.bias)
    return model


def cut(model: nn.Module, family: ModelFamily, mode: str) -> Compensated:
    table = family.axis_table(model)
    return compensate(model, family, table, random_keep(table, WIDTHS), BATCHES, Options(mode=mode))


@pytest.mark.parametrize("mode", ["refit", "full"])
@pytest.mark.parametrize("model_type", ["distilbert", "electra"])
def test_compensated_cuts_are_those_of_bert(model_type, mode):
    bert, family = bert_model(), family_of(model_type)
    model = transplanted(bert, model_type)
    for batch in BATCHES:
        options = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        torch.testing.assert_close(model(**options).logits, bert(**options).logits)
    ours, theirs = cut(model, family, mode), cut(bert, BERT, mode)
    assert ours.report["lost"] == pytest.approx(theirs.report["lost"], rel=1e-4)
    parts = zip(modules_of(ours.model, family), modules_of(theirs.model, BERT), strict=True)
    weights = [(our.weight, their.weight) for our, their in parts]
    weights += [(family.decoder(ours.model).weight, BERT.decoder(theirs.model).weight)]
    for our, their in weights:
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)
    batch = BATCHES[0]
    logits = [each.model(batch.input_ids, attention_mask=batch.attention_mask).logits for each in (ours, theirs)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
