"""Every family with fewer pieces: the same logits for texts of those that stay, and a stock checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from families.cases import CASES, TOKENS, VOCABULARY, make_model

from homodistil.errors import UserError
from homodistil.models import FAMILIES, family_of
from homodistil.models.vocabulary import keep_rows, special_ids, vocabulary_parameters, with_vocab_size

MODEL_TYPES = sorted(FAMILIES)
ENCODERS = sorted(name for name, family in FAMILIES.items() if not family.is_causal)


def kept_ids(model_type: str) -> list[int]:
    """A third of the vocabulary, and what the configuration names."""
    drawn = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(3))[: VOCABULARY // 3]
    return sorted({0, 1, 2, *drawn.tolist(), *special_ids(CASES[model_type].make_config())})


def text_of(kept: list[int]) -> torch.Tensor:
    """int64 (2, T), positions in `kept`; no special ids."""
    return torch.randint(4, len(kept), (2, TOKENS), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_of_the_pieces_that_stay_are_the_same(model_type, tmp_path):
    family, kept = family_of(model_type), kept_ids(model_type)
    whole = make_model(model_type, "eager").double()
    model, new = copy.deepcopy(whole), text_of(kept)
    keep_rows(model, family, kept)
    model.save_pretrained(tmp_path)
    stock = getattr(transformers, family.auto_class).from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float64
    )
    with torch.no_grad():
        states = family.backbone(whole)(input_ids=torch.tensor(kept)[new])[0]
        logits = whole(input_ids=torch.tensor(kept)[new]).logits[..., kept]
        assert torch.equal(family.backbone(model)(input_ids=new)[0], states)
        for smaller in (model, stock.eval()):
            # The decoder's product has other blocks of columns: each sum is the same, in another order.
            torch.testing.assert_close(smaller(input_ids=new).logits, logits, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stock.parameters(), strict=True))
    assert stock.config.vocab_size == len(kept) < VOCABULARY
    assert {p.shape[0] for p in vocabulary_parameters(stock, family).values()} == {len(kept)}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_nothing_else_changes(model_type):
    """Every parameter without rows of the vocabulary is the same object, and tied ones stay tied."""
    family, model, kept = family_of(model_type), make_model(model_type), kept_ids(model_type)
    before, rows = dict(model.named_parameters()), vocabulary_parameters(model, family)
    untouched = {name: p.detach().clone() for name, p in before.items() if name not in rows}
    of_rows = {name: p.detach().clone() for name, p in rows.items()}
    keep_rows(model, family, kept)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert all(torch.equal(after[name], value) for name, value in untouched.items())
    assert all(torch.equal(after[name], value[kept]) for name, value in of_rows.items())
    decoder, embeddings = family.decoder(model).weight, family.backbone(model).get_input_embeddings().weight
    assert (decoder is embeddings) == model.config.tie_word_embeddings


@pytest.mark.parametrize("model_type", ENCODERS)
def test_an_encoder_without_a_head(model_type, tmp_path):
    family, kept = family_of(model_type), kept_ids(model_type)
    whole = make_model(model_type, "eager")
    family.drop_head(whole)
    model, new = copy.deepcopy(whole), text_of(kept)
    keep_rows(model, family, kept)
    family.backbone(model).save_pretrained(tmp_path)
    stock = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = family.backbone(whole)(input_ids=torch.tensor(kept)[new])[0]
        assert torch.equal(stock(input_ids=new)[0], expected)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_ids_that_a_configuration_names(model_type):
    """They get their new number, one that has gone is left out, and what is planned has ids below its vocabulary."""
    model, family = make_model(model_type), family_of(model_type)
    model.config.eos_token_id, model.config.bos_token_id, model.config.pad_token_id = [9, 50], 7, 1
    keep_rows(model, family, [0, 1, 2, 5, 9, 11, 60])
    assert model.config.eos_token_id == [4]
    assert (model.config.bos_token_id, model.config.pad_token_id) == (None, 1)
    if (generation := getattr(model, "generation_config", None)) is not None and family.is_causal:
        assert generation.eos_token_id in (2, None, [4])
    config = CASES[model_type].make_config()
    config.pad_token_id = 90
    planned = with_vocab_size(config, 40)
    assert (planned.vocab_size, planned.pad_token_id, config.vocab_size) == (40, 39, VOCABULARY)
    assert not special_ids(planned) - set(range(40))


def test_rows_that_are_somewhere_else_as_well_are_refused():
    """A bias for the pieces that is not the decoder's."""
    model = make_model("bert")
    model.cls.predictions.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
    with pytest.raises(UserError, match=r"^student.vocab: cls.predictions.bias of this bert model has shape \(97,\)"):
        keep_rows(model, family_of("bert"), kept_ids("bert"))
