"""Terms of the rivals against other people's code (TextBrewer) and against the papers' formulas, written as loops."""

import math
import sys
from pathlib import Path

import pytest
import torch
from support.small import small_batch, small_model
from torch import nn

from benchmarks.peers.processes import PeerError, textbrewer_paths
from homodistil.config.schema import LossConfig
from homodistil.distill.layer_map import LayerMap
from homodistil.distill.losses.cosine import CosineProjection, cosine_distance
from homodistil.distill.losses.relations import regrouped, relation_loss
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.models.activations import LayerActivations, show_values
from homodistil.models.encoders.bert import BERT as bert

NOTHING = dict.fromkeys(("mlm", "kl", "hidden", "attention", "embedding"), 0.0)
# fp32 sums of a few hundred terms against float64.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def lengths_mask(*lengths: int) -> torch.Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def assert_gradients_close(found, expected, tolerance=1e-5):
    """Relative to the largest entry: single entries may cancel to nearly 0."""
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs.double()).abs().max() <= tolerance * theirs.abs().max().clamp_min(1e-12)


# -- DistilBERT: the cosine of the last hidden states


def naive_cosine(student, teacher, mask):
    """Mean over valid tokens of 1 - s.t / (|s| |t|), one token at a time."""
    distances = []
    for b in range(student.shape[0]):
        for t in range(student.shape[1]):
            if mask[b, t]:
                s, goal = student[b, t], teacher[b, t]
                product = sum(s[d] * goal[d] for d in range(len(s)))
                distances.append(1 - product / (s.square().sum().sqrt() * goal.square().sum().sqrt()))
    return torch.stack(distances).mean()


@pytest.mark.parametrize("width", [5, 9])
@pytest.mark.parametrize("lengths", [(7, 3, 1), (4,)])
def test_cosine_term_is_its_formula(width, lengths):
    torch.manual_seed(0)
    mask = lengths_mask(*lengths)
    student = torch.randn(*mask.shape, width, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(*mask.shape, 9, dtype=torch.float64)
    projection = CosineProjection(9, width, learned=True, is_origin=False).double()
    parameters = [student] if width == 9 else [student, projection.weight]
    if width == 9:
        found, expected = cosine_distance(student, teacher, mask), naive_cosine(student, teacher, mask)
    else:
        found = projection(student, teacher, mask)
        expected = naive_cosine(torch.einsum("btd,ed->bte", student, projection.weight), teacher, mask)
    found = found / mask.sum()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert_gradients_close(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), tolerance=1e-10
    )


# -- MiniLMv2: relations


def naive_relations(student, teacher, mask, num_heads):
    """Sum over Q, K, V of KL(teacher || student), mean over relation heads and valid query rows, row by row."""
    total, batch_size = 0.0, mask.shape[0]
    for ours, theirs in zip(student, teacher, strict=True):
        rows = []
        for b in range(batch_size):
            valid = [t for t in range(mask.shape[1]) if mask[b, t]]
            for head in range(num_heads):
                logs = []
                for heads in (theirs, ours):
                    side_by_side = torch.cat([heads[b, n] for n in range(heads.shape[1])], dim=-1)  # (T, N x H)
                    dims = side_by_side.shape[1] // num_heads
                    part = side_by_side[:, head * dims : (head + 1) * dims]
                    logs.append(
                        [
                            torch.stack([part[i] @ part[j] / math.sqrt(dims) for j in valid]).log_softmax(0)
                            for i in valid
                        ]
                    )
                rows += [(log_t.exp() * (log_t - log_s)).sum() for log_t, log_s in zip(*logs, strict=True)]
        total = total + torch.stack(rows).mean()
    return total


def heads_of(mask, num_heads, dims, seed, dtype=torch.float32):
    """(B, N, T, H) three times, strided as a model's are: dims of all heads lie side by side."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(*mask.shape, num_heads, dims, generator=generator).to(dtype) for _ in range(3)]
    return [tensor.transpose(1, 2).detach().requires_grad_() for tensor in made]


@pytest.mark.parametrize(
    "student_heads, teacher_heads, num_heads",
    [((3, 4), (4, 6), 6), ((3, 4), (4, 6), 1), ((2, 6), (4, 6), 12), ((4, 6), (4, 6), 4), ((5, 3), (1, 15), 3)],
)
@pytest.mark.parametrize("lengths", [(7, 3, 1), (5,)])
def test_relation_term_is_its_formula(student_heads, teacher_heads, num_heads, lengths):
    mask = lengths_mask(*lengths)
    ours, theirs = heads_of(mask, *student_heads, seed=1), heads_of(mask, *teacher_heads, seed=2)
    found = relation_loss(LayerActivations(None, *ours), LayerActivations(None, *theirs), mask, num_heads) / mask.sum()
    exact = [[tensor.detach().double().requires_grad_() for tensor in side] for side in (ours, theirs)]
    expected = naive_relations(*exact, mask, num_heads)
    torch.testing.assert_close(found.double(), expected, **CLOSE)
    if lengths != (1,) and found > 0:
        assert_gradients_close(torch.autograd.grad(found, ours), torch.autograd.grad(expected, exact[0]))


def test_padding_changes_no_relation():
    mask = lengths_mask(6, 2)
    ours, theirs = heads_of(mask, 3, 4, seed=1), heads_of(mask, 2, 6, seed=2)
    found = relation_loss(LayerActivations(None, *ours), LayerActivations(None, *theirs), mask, 3)
    for tensor in (*ours, *theirs):
        tensor.data[1, :, 2:] = 7.0
    assert torch.equal(found, relation_loss(LayerActivations(None, *ours), LayerActivations(None, *theirs), mask, 3))


def test_regrouping_keeps_the_order_of_dims_and_copies_nothing():
    layer = torch.arange(2 * 5 * 12.0).view(2, 5, 12)  # (B, T, all heads)
    heads = layer.view(2, 5, 3, 4).transpose(1, 2)
    regrouped_heads = regrouped(heads, 6)
    assert torch.equal(regrouped_heads[1, 2, 3], layer[1, 3, 4:6])
    assert regrouped_heads.data_ptr() == layer.data_ptr()


# -- both, through student and teacher: which layers are looked at


def rival_pair(config: LossConfig, lock_step: bool = True):
    """A narrow student of 2 layers with weights of its own, and a teacher of 4."""
    teacher = small_model(num_hidden_layers=4)
    model = small_model(seed=5, hidden_size=15, num_attention_heads=3, intermediate_size=20, num_hidden_layers=2)
    show_values(teacher, bert, config.relation_layer)
    layer_map = LayerMap(24, 4, (1, 3), is_origin=False)
    torch.manual_seed(1)
    return Student(model, config, layer_map=layer_map), Teacher(teacher, lock_step)


def stock(model, batch):
    """Hidden states (embeddings first) and per layer [queries, keys, values], of a stock float64 copy."""
    heads, size = model.config.num_attention_heads, model.config.hidden_size // model.config.num_attention_heads
    model = model.double()
    model.set_attn_implementation("eager")
    outputs = model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    parts = []
    for layer, hidden in zip(model.bert.encoder.layer, outputs.hidden_states[:-1], strict=True):
        projections = (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value)
        parts.append([p(hidden).unflatten(-1, (heads, size)).transpose(1, 2) for p in projections])
    return outputs.hidden_states, parts


def with_references(config, lock_step=True, batch=None):
    """Terms and gradients of ours, and what references are made of."""
    student, teacher = rival_pair(config, lock_step)
    found = student(batch, teacher(batch))
    found.total.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    student.projections.double()
    hidden, parts = stock(student.model, batch)
    with torch.no_grad():
        their_hidden, their_parts = stock(teacher.model, batch)
    student.zero_grad()
    return found, gradients, student, (hidden, parts), (their_hidden, their_parts)


def assert_same_gradients(student, found, expected):
    expected.backward()
    reference = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    largest = max(gradient.abs().max() for gradient in reference.values())
    for name, gradient in reference.items():
        ours = found.get(name, torch.zeros_like(gradient))  # frozen: no gradient reaches it in the reference either
        assert (ours.double() - gradient).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("lock_step", [True, False])
@pytest.mark.parametrize("layer", [-1, 1])
def test_relations_of_the_wanted_teacher_layer_meet_the_students_last(lock_step, layer):
    config, batch = LossConfig(**NOTHING, relations=1.0, relation_layer=layer, relation_heads=3), small_batch()
    found, gradients, student, (_, ours), (_, theirs) = with_references(config, lock_step, batch)
    expected = naive_relations(ours[-1], theirs[layer], batch.attention_mask, 3)
    torch.testing.assert_close(found.terms["relations"].double(), expected, **CLOSE)
    assert_same_gradients(student, gradients, expected)


@pytest.mark.parametrize("lock_step", [True, False])
def test_cosine_of_the_last_states_goes_through_a_projection_of_its_own(lock_step):
    config, batch = LossConfig(**NOTHING, cosine=2.0), small_batch()
    found, gradients, student, (ours, _), (theirs, _) = with_references(config, lock_step, batch)
    projected = ours[-1] @ student.projections["last"].weight.t()
    expected = naive_cosine(projected, theirs[-1], batch.attention_mask)
    torch.testing.assert_close(found.terms["cosine"].double(), expected, **CLOSE)
    assert_same_gradients(student, gradients, 2 * expected)


def test_copies_of_the_teacher_are_at_distance_0():
    config, batch = LossConfig(kl=1.0, cosine=1.0, relations=1.0), small_batch()
    teacher = small_model()
    show_values(teacher, bert, -1)
    terms = Student(small_model(), config)(batch, Teacher(teacher)(batch)).terms
    assert abs(terms["cosine"].item()) <= 1e-6 and abs(terms["relations"].item()) <= 1e-6


def test_what_no_term_reads_is_frozen():
    student, _ = rival_pair(LossConfig(**NOTHING, relations=1.0))
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    last = "model.bert.encoder.layer.1."
    assert {name for name in frozen if name.startswith(last)} == {
        name for name, _ in student.named_parameters() if name.startswith(last) and "attention.self" not in name
    }
    student, teacher = rival_pair(LossConfig(**(NOTHING | {"attention": 1.0})))
    student(small_batch(), teacher(small_batch())).total.backward()
    assert all(p.requires_grad == (p.grad is not None) for name, p in student.named_parameters() if "layer.1" in name)
    student, _ = rival_pair(LossConfig(**(NOTHING | {"hidden": 1.0})))
    assert all(p.requires_grad for name, p in student.named_parameters() if "encoder" in name)


# -- TinyBERT: against TextBrewer's own functions


@pytest.fixture(scope="module")
def textbrewer_losses():
    """TextBrewer's loss functions, installed beside our packages as benchmarks/peers does it."""
    try:
        folders = textbrewer_paths(Path("~/.cache/homodistil/textbrewer").expanduser())
    except PeerError as error:
        pytest.skip(str(error))
    sys.path.extend(folders)
    try:
        from textbrewer import losses
    except ImportError as error:
        pytest.skip(f"textbrewer cannot be imported: {error}")
    finally:
        for folder in folders:
            sys.path.remove(folder)
    return losses


def scores(parts, heads):
    """Attention before the softmax, of the first `heads` heads."""
    queries, keys, _ = (part[:, :heads] for part in parts)
    return queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])


@pytest.mark.parametrize("lock_step", [True, False])
def test_tinyberts_terms_are_textbrewers(textbrewer_losses, lock_step):
    weights = {"hidden": 1.0, "attention": 0.5, "embedding": 2.0}
    config, batch = LossConfig(**(NOTHING | weights)), small_batch()
    found, gradients, student, (hidden, parts), (their_hidden, their_parts) = with_references(config, lock_step, batch)
    mask, layers = batch.attention_mask.double(), (1, 3)

    def distance(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        projected = nn.functional.linear(ours, student.projections[name].weight)
        return textbrewer_losses.hid_mse_loss(projected, theirs, mask)

    expected = {
        "embedding": distance("embedding", hidden[0], their_hidden[0]),
        "hidden": sum(distance(f"layer_{m}", hidden[m + 1], their_hidden[n + 1]) for m, n in enumerate(layers)),
        "attention": sum(
            textbrewer_losses.att_mse_loss(scores(parts[m], 3), scores(their_parts[n], 3), mask)
            for m, n in enumerate(layers)
        ),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found.terms[name].double(), value, **CLOSE)
    assert_same_gradients(student, gradients, sum(weights[name] * value for name, value in expected.items()))
