"""Our slicing of a real BERT gives the logits of Torch-Pruning's: the same heads gone, their code against ours.

Neurons and residual dims of every family, by Torch-Pruning's dependency graph: tests/families/test_torch_pruning.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from transformers import BertConfig, BertForMaskedLM

from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.resize_plan import make_plan, slice_module

NUM_HEADS, HEAD_DIM, FFN, TOKENS = 4, 9, 55, 11


@pytest.fixture()
def model() -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=NUM_HEADS * HEAD_DIM,
        num_hidden_layers=2,
        num_attention_heads=NUM_HEADS,
        intermediate_size=FFN,
        vocab_size=97,
        max_position_embeddings=16,
        initializer_range=0.3,  # logits of several units, so that a wrong neuron shows
    )
    model = BertForMaskedLM(config).eval()
    for parameter in model.parameters():  # biases too: at 0 they would hide a wrong slice
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture()
def input_ids() -> torch.Tensor:
    return torch.randint(0, 97, (3, TOKENS), generator=torch.Generator().manual_seed(1))


def prune_ours(model: BertForMaskedLM, keep: dict[str, torch.Tensor]) -> None:
    plan = make_plan(bert.axis_table(model), keep)
    slice_module(model, plan)
    bert.refresh(model, plan.widths_after)


def assert_same(ours: BertForMaskedLM, theirs: BertForMaskedLM, input_ids: torch.Tensor, before: torch.Tensor) -> None:
    theirs_named = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs_named[name]), name
    with torch.no_grad():
        expected, found = theirs(input_ids=input_ids).logits, ours(input_ids=input_ids).logits
    assert torch.equal(found, expected)  # the same operations on the same numbers
    assert (expected - before).abs().max() > 0.1, "nothing that mattered was removed"


def test_heads(model, input_ids):
    before, theirs = model(input_ids=input_ids).logits.detach(), copy.deepcopy(model)
    gone = {0: [2], 1: [0, 3]}
    for i, heads in gone.items():
        rows = [head * HEAD_DIM + d for head in heads for d in range(HEAD_DIM)]
        attention = theirs.bert.encoder.layer[i].attention
        for projection in (attention.self.query, attention.self.key, attention.self.value):
            tp.prune_linear_out_channels(projection, rows)
        tp.prune_linear_in_channels(attention.output.dense, rows)
        attention.self.num_attention_heads = NUM_HEADS - len(heads)
    keep = {f"layer.{i}.heads": torch.tensor([h for h in range(NUM_HEADS) if h not in gone[i]]) for i in gone}
    prune_ours(model, keep)
    assert model.bert.encoder.layer[1].attention.self.value.weight.shape == (2 * HEAD_DIM, NUM_HEADS * HEAD_DIM)
    assert_same(model, theirs, input_ids, before)
