"""Student and objective against Hugging Face's own outputs, at step 0 and after neurons have gone."""

import pytest
import torch
from support.small import random_keep, small_batch, small_model, small_pair

from homodistil.config.schema import LossConfig
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.models.axes import compose, outer_axes, whole
from homodistil.models.resize_plan import make_plan, slice_module

TERMS = ("kl", "hidden", "attention", "embedding")
# fp32, a few hundred terms summed in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("projection", ["student", "teacher"])
@pytest.mark.parametrize("positions", ["masked", "all"])
@pytest.mark.parametrize("target", ["scores", "centred_scores", "probabilities"])
@pytest.mark.parametrize("space", ["raw", "normalised"])
def test_distillation_terms_are_zero_at_step_0(projection, positions, target, space):
    options = {"attention_target": target, "hidden_space": space}
    student, teacher = small_pair(projection=projection, kl_positions=positions, **options)
    batch = small_batch()
    terms = student(batch, teacher(batch)).terms
    assert all(abs(terms[name].item()) <= 1e-6 for name in TERMS), terms
    assert terms["mlm"].item() > 1


def _naive_terms(student_model, teacher_model, batch, positions, space="raw", num_first=0):
    """The same terms from stock outputs (eager attention, all hidden states), in float64."""
    outputs = []
    for model in (student_model, teacher_model):
        model = model.double()
        model.set_attn_implementation("eager")
        with torch.no_grad():
            outputs.append(model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True))
    valid = batch.attention_mask.bool()
    rows = valid if positions == "all" else torch.zeros_like(valid).flatten().index_fill(0, batch.target_index, True)
    rows = rows.view_as(valid)
    p, q = (o.logits[rows].softmax(-1) for o in reversed(outputs))
    states = [o.hidden_states for o in outputs]
    if space == "normalised":
        states = [[x / x.square().mean(-1, keepdim=True).sqrt() for x in side] for side in states]
    behind = torch.stack([row & (torch.arange(len(row)) >= num_first) for row in valid])
    hidden = [
        (s[seen] - t[seen]).square().mean()
        for s, t, seen in zip(*states, [valid] + [behind] * (len(states[0]) - 1), strict=True)
    ]
    labels = outputs[0].logits.flatten(0, 1)[batch.target_index].log_softmax(-1)
    return {
        "mlm": -labels.gather(1, batch.target_ids[:, None]).mean(),
        "kl": (p * (p.log() - q.log())).sum(-1).mean(),
        "embedding": hidden[0],
        "hidden": sum(hidden[1:]),
    }


@pytest.mark.parametrize("positions", ["masked", "all"])
def test_terms_equal_stock_outputs_of_two_different_models(positions):
    config, batch = LossConfig(kl=1.0, kl_positions=positions), small_batch()
    student, teacher = Student(small_model(seed=1), config), Teacher(small_model())
    terms = student(batch, teacher(batch)).terms
    naive = _naive_terms(small_model(seed=1), small_model(), batch, positions)
    for name, expected in naive.items():
        torch.testing.assert_close(terms[name].double(), expected, **CLOSE)


@pytest.mark.parametrize("num_first", [0, 1, 3])
@pytest.mark.parametrize("space", ["raw", "normalised"])
@pytest.mark.parametrize("projection", ["student", "teacher"])
def test_hidden_states_normalised_and_without_the_first_tokens(projection, space, num_first):
    """The embedding term has all tokens; the others know nothing of either."""
    batch = small_batch().with_tokens_behind(num_first)
    options = {"hidden_space": space, "skip_first_tokens": num_first, "projection": projection}
    student, teacher = Student(small_model(seed=1), LossConfig(kl=1.0, **options)), Teacher(small_model())
    plain = Student(small_model(seed=1), LossConfig(kl=1.0))
    terms, without = student(batch, teacher(batch)).terms, plain(batch, teacher(batch)).terms
    naive = _naive_terms(small_model(seed=1), small_model(), batch, "masked", space, num_first)
    for name, expected in naive.items():
        torch.testing.assert_close(terms[name].double(), expected, **CLOSE)
    assert all(torch.equal(terms[name], without[name]) for name in ("mlm", "kl", "attention"))
    assert torch.equal(terms["hidden"], without["hidden"]) == (space == "raw" and not num_first)


def test_total_is_the_weighted_sum_and_zero_weights_are_left_out():
    batch = small_batch()
    weights = {"mlm": 0.5, "kl": 2.0, "hidden": 0.0, "attention": 0.25, "embedding": 1.5}
    student = Student(small_model(seed=1), LossConfig(**({"kl": 1.0} | weights)))
    total, terms = student(batch, Teacher(small_model())(batch))
    assert "hidden" not in terms and "layer_0" not in student.projections
    expected = sum(weights[name] * terms[name] for name in weights if weights[name])
    torch.testing.assert_close(total, expected, **CLOSE)


def test_splitting_a_batch_does_not_change_loss_or_gradient():
    """Two micro-batches with the mean counts of both = one batch: what makes losses independent of sharding."""
    whole_batch = small_batch(lengths=(7, 7, 5, 3))
    num_tokens = whole_batch.input_ids.shape[1]
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        inside = (whole_batch.target_index >= rows.start * num_tokens) & (
            whole_batch.target_index < rows.stop * num_tokens
        )
        counts = type(whole_batch.counts)(*(value / 2 for value in whole_batch.counts[:3]))
        index = whole_batch.target_index[inside] - rows.start * num_tokens
        batch = whole_batch._replace(
            input_ids=whole_batch.input_ids[rows], attention_mask=whole_batch.attention_mask[rows]
        )
        tokens = batch.attention_mask.flatten().nonzero().squeeze(1)
        batch = batch._replace(target_index=index, target_ids=whole_batch.target_ids[inside], token_index=tokens)
        parts.append(batch._replace(counts=counts))
    gradients, totals = [], []
    for batches in ([whole_batch], parts):
        student, teacher = Student(small_model(seed=1), LossConfig(kl=1.0)), Teacher(small_model())
        total = sum(student(b, teacher(b)).total for b in batches) / len(batches)
        total.backward()
        totals.append(total.detach())
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    torch.testing.assert_close(totals[0], totals[1], **CLOSE)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **CLOSE)


def test_axis_table_describes_every_dimension():
    student, _ = small_pair()
    shapes = {name: p.shape for name, p in student.named_parameters()}
    table = student.axis_table()
    described = {(use.parameter, use.dim) for use in table.uses}
    assert all(shapes[name][dim] == size for (name, dim), size in table.dim_sizes().items())
    undescribed = {(name, dim) for name, shape in shapes.items() for dim in range(len(shape))} - described
    # What does not shrink: vocabulary, positions, token types, and the teacher's side of the projections.
    embeddings = {f"model.bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
    projections = {name for name in shapes if name.startswith("projections.")}
    assert undescribed == {(name, 0) for name in {*embeddings, *projections, "model.cls.predictions.bias"}}


def _resize(student, widths, seed=0):
    plan = make_plan(student.axis_table(), random_keep(student.axis_table(), widths, seed))
    slice_module(student, plan)
    student.after_resize(plan.keep)
    return plan


def test_sliced_ffn_neurons_equal_zeroed_ones():
    student, _ = small_pair()
    zeroed = small_model()
    plan = _resize(student, {"layer.1.ffn": 17})
    gone = torch.ones(40).index_fill(0, plan.keep["layer.1.ffn"], 0.0).bool()
    with torch.no_grad():
        zeroed.bert.encoder.layer[1].output.dense.weight[:, gone] = 0
    batch = small_batch()
    logits = zeroed(batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)[batch.target_index]
    torch.testing.assert_close(student.predict(batch), logits.detach(), **CLOSE)


def test_pruned_heads_are_compared_with_the_teacher_heads_they_came_from():
    student, teacher = small_pair()
    # Heads of layer 0 read the embeddings, which nothing has changed: survivors still score as in the teacher.
    _resize(student, {"layer.0.heads": 3}, seed=1)
    _resize(student, {"layer.0.heads": 2}, seed=2)
    assert student.head_maps[0].tolist() == sorted(student.head_maps[0].tolist()) and len(student.head_maps[0]) == 2
    batch = small_batch()
    assert student(batch, teacher(batch)).terms["attention/layer.0"].item() <= 1e-6


@pytest.mark.parametrize("projection", ["student", "teacher"])
def test_a_resized_student_trains_and_its_terms_stay_finite(projection):
    student, teacher = small_pair(projection=projection)
    widths = {"hidden": 19} | {
        f"layer.{i}.{kind}": w
        for i in range(3)
        for kind, w in {"ffn": 21, "heads": 3, "qk_dim": 5, "vo_dim": 5}.items()
    }
    _resize(student, widths)
    assert student.widths == widths | {axis: w for axis, w in student.widths.items() if axis not in widths}
    batch = small_batch()
    total, terms = student(batch, teacher(batch))
    total.backward()
    assert all(torch.isfinite(value) for value in terms.values()) and terms["hidden"] > 0
    assert all(p.grad is not None and p.grad.shape == p.shape for p in student.parameters())


def test_origins_of_entries_follow_two_events():
    widths = {"hidden": 6, "layer.0.heads": 3, "layer.0.qk_dim": 4}
    kept = whole(widths)
    first = {"hidden": torch.tensor([0, 2, 3, 5]), "layer.0.heads": torch.tensor([0, 2])}
    first["layer.0.qk_dim"] = torch.tensor([[0, 1, 3], [0, 1, 2], [1, 2, 3]])
    kept = compose(kept, first, outer_axes(widths))
    second = {"hidden": torch.tensor([1, 3]), "layer.0.qk_dim": torch.tensor([[0, 2], [1, 2]])}
    kept = compose(kept, second, outer_axes(widths))
    assert kept["hidden"].tolist() == [2, 5] and kept["layer.0.heads"].tolist() == [0, 2]
    assert kept["layer.0.qk_dim"].tolist() == [[0, 3], [2, 3]]


def test_without_logit_terms_the_head_is_frozen_but_not_the_tied_embedding():
    student = Student(small_model(), LossConfig(mlm=0.0, kl=0.0))
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert "model.cls.predictions.transform.dense.weight" in frozen
    assert not any("word_embeddings" in name for name in frozen)
