"""Block influence against its definition, and which layers stay."""

from __future__ import annotations

import pytest
import torch
from families.cases import CASES, batch_of, make_model, token_ids
from support.tiny_decoder import make_decoder
from torch.nn.functional import cosine_similarity
from transformers import GPT2Config, LlamaConfig

from homodistil.config.schema import LossConfig
from homodistil.data.batch import Batch
from homodistil.distill.student import Student
from homodistil.models import family_of
from homodistil.models.activations import ActivationHooks
from homodistil.pruning.block_influence import block_influence, most_influential


@pytest.mark.parametrize("kind", [LlamaConfig, GPT2Config])
def test_it_is_one_minus_the_cosine_of_both_ends(kind):
    model = make_decoder(kind)
    layers = family_of(model.config.model_type).layers(model)
    hooks = ActivationHooks(model, family_of(model.config.model_type))

    def show(batch, visitor):
        with hooks.shown_to(visitor):
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)

    ids = torch.randint(300, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batch = Batch(ids, mask, None, None, mask.flatten().nonzero()[:, 0], None)
    measured = block_influence(show, 2, [batch, batch])
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    # The last of the library's states is behind the final norm: the layer's own output is not among them.
    cosines = cosine_similarity(states[0].double(), states[1].double(), dim=-1)
    assert measured[0] == pytest.approx(1 - float(cosines[mask.bool()].mean()), abs=1e-6)
    assert len(measured) == 2 and 0 < measured[1] < 2

    with torch.no_grad():  # a layer that adds nothing
        for name, parameter in layers[1].named_parameters():
            if "o_proj" in name or "down_proj" in name or "c_proj" in name:
                parameter.zero_()
    assert block_influence(show, 2, [batch])[1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("model_type", sorted(CASES))
def test_of_every_family_the_states_are_the_librarys(model_type):
    student, ids = Student(make_model(model_type), LossConfig()), token_ids()
    first, _ = block_influence(student.show, 2, [batch_of(ids)])
    with torch.no_grad():
        states = make_model(model_type, attention="eager")(input_ids=ids, output_hidden_states=True).hidden_states
    assert first == pytest.approx(1 - float(cosine_similarity(states[0], states[1], dim=-1).mean()), abs=1e-5)


def test_the_layers_that_change_most_stay_in_their_order():
    assert most_influential([0.5, 0.1, 0.3, 0.1, 0.9], 3) == [0, 2, 4]
    assert most_influential([0.2, 0.1, 0.1], 2) == [0, 1]


def test_only_candidates_leave():
    assert most_influential([0.1, 0.5, 0.3, 0.4], 3, candidates=[1, 3]) == [0, 1, 2]
    assert most_influential([0.1, 0.5, 0.3, 0.4], 2, candidates=[1, 3]) == [0, 2]
