"""MPNet's own way of attention: a bias by distance, one table of it for all layers, a mask that is added to scores."""

from __future__ import annotations

import pytest
import torch
from families.cases import make_model, token_ids
from families.test_conformance import batch_of, cut_student
from transformers import MPNetConfig

from homodistil.config.schema import LossConfig, RunConfig
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.errors import UserError
from homodistil.models.activations import show_values
from homodistil.models.encoders.mpnet import MPNET
from homodistil.training.resolve import resolve_run
from homodistil.training.settle import settle
from homodistil.training.shape_checks import check_shape

CUTS = [{}, {"hidden_size": 16, "num_attention_heads": 4}]


@pytest.mark.parametrize("cut", CUTS, ids=["whole", "cut"])
def test_what_the_taps_see_makes_the_stock_models_attention(cut):
    """Probabilities from queries, keys, the scale of the start, the bias and the padding; context from the values."""
    student, ids, mask = cut_student("mpnet", cut), token_ids(), torch.ones(2, 17, dtype=torch.int64)
    mask[1, -4:] = 0
    model, taps = student.model, student._taps
    show_values(model, MPNET, 0)
    context = {}
    model.mpnet.encoder.layer[0].attention.attn.o.register_forward_pre_hook(lambda _m, args: context.update(o=args[0]))
    with torch.no_grad():
        seen = taps.run(ids, mask)
        stock = model.mpnet(input_ids=ids, attention_mask=mask, output_attentions=True)
        assert torch.equal(seen.last, stock.last_hidden_state)
        bias = model.mpnet.encoder.compute_position_bias(seen.embedding)
        hidden = torch.finfo(torch.float32).min * (1 - mask[:, None, None].float())
        for i, probabilities in enumerate(stock.attentions):
            scores = seen.queries[i] @ seen.keys[i].transpose(-1, -2) * student.softmax_scale
            torch.testing.assert_close((scores + bias + hidden).softmax(-1), probabilities)
        values = stock.attentions[0] @ seen.relations.values
        torch.testing.assert_close(values.transpose(1, 2).flatten(2), context["o"])
    assert student.softmax_scale == 6**-0.5


def test_the_same_heads_go_in_all_layers_and_take_their_bias_along():
    student = cut_student("mpnet", CUTS[1])
    heads = student.origins["heads"]
    assert len(heads) == 4 and all(torch.equal(heads, of_layer) for of_layer in student.head_maps)
    whole = make_model("mpnet").mpnet.encoder.relative_attention_bias.weight
    assert torch.equal(student.model.mpnet.encoder.relative_attention_bias.weight, whole[:, heads])
    assert student.model.mpnet.encoder.n_heads == 4


def test_a_teacher_in_half_precision_beside_a_student_in_fp32():
    batch = batch_of(token_ids())
    batch.attention_mask[1, -3:] = 0
    batch = batch._replace(token_index=batch.attention_mask.flatten().nonzero().squeeze(1))
    student = Student(make_model("mpnet"), LossConfig(kl=1.0))
    teachers = [Teacher(make_model("mpnet").bfloat16(), way) for way in (True, False)]
    with torch.no_grad():
        beside, alone = (student(batch, teacher(batch)).terms for teacher in teachers)
    assert beside == alone and all(torch.isfinite(term) for term in beside.values())


@pytest.mark.parametrize("pad", [0, 1])
def test_positions_begin_behind_two_whatever_the_padding_is(pad):
    assert MPNET.shape(MPNetConfig(max_position_embeddings=514, pad_token_id=pad)).max_tokens == 512


@pytest.mark.parametrize("target", ["probabilities", "probabilities_kl"])
def test_maps_that_the_term_cannot_see_are_refused(target):
    config, shape = RunConfig(), MPNetConfig(num_hidden_layers=2)
    config.student.preset, config.student.num_hidden_layers = "homobert-small", 2
    settle(config, shape)
    assert config.pruning.compensation == "full"
    for allowed in (config.loss.attention_target, "centred_scores"):  # without the bias, as the scores are
        config.loss.attention_target = allowed
        check_shape(resolve_run(config, shape))
    config.loss.attention_target = target
    message = f"loss.attention_target: found {target}, allowed is scores or centred_scores for this teacher"
    with pytest.raises(UserError, match=message):
        check_shape(resolve_run(config, shape))
