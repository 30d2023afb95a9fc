"""Terms as classes: what each counts against formulas written down apart, how they are registered, their modules."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.small import small_batch, small_model
from torch import nn

from homodistil.config.plugins import load_plugins
from homodistil.config.schema import LossConfig
from homodistil.distill.losses import term as terms
from homodistil.distill.losses.active import active_terms
from homodistil.distill.losses.projection import Projection
from homodistil.distill.losses.term import BatchSizes, Term, register, registered
from homodistil.distill.objective import Objective
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.errors import UserError

SEQUENCES, SEQ_LEN, ROWS, VOCAB = 3, 13, 7, 101
TOKENS = SEQUENCES * SEQ_LEN


def widths_of(hidden: int, ffn: int, heads: int, qk_dim: int, vo_dim: int, num_layers: int) -> dict[str, int]:
    layer = {"ffn": ffn, "heads": heads, "qk_dim": qk_dim, "vo_dim": vo_dim}
    return {"hidden": hidden} | {f"layer.{i}.{kind}": size for i in range(num_layers) for kind, size in layer.items()}


STUDENT, TEACHER = widths_of(15, 20, 3, 4, 5, 2), widths_of(24, 40, 4, 6, 6, 4)
SIZES = BatchSizes(STUDENT, TEACHER, SEQUENCES, SEQ_LEN, ROWS, VOCAB, student_bytes=2, teacher_bytes=4)


def the_term(name: str, **options) -> Term:
    loss = LossConfig().only(**{name: 1.0})
    (term,) = active_terms(dataclasses.replace(loss, **options))
    return term


@pytest.mark.parametrize(
    ("name", "options", "flops", "saved"),
    [
        # W forward, the gradient of W, the gradient of the student's states.
        ("embedding", {}, 3 * 2 * TOKENS * 15 * 24, TOKENS * 15 * 2),
        ("embedding", {"projection_learned": False}, 2 * 2 * TOKENS * 15 * 24, TOKENS * 15 * 2),
        ("hidden", {}, 2 * 3 * 2 * TOKENS * 15 * 24, 2 * TOKENS * 15 * 2),
        ("hidden", {"hidden_space": "normalised"}, 2 * 3 * 2 * TOKENS * 15 * 24, 2 * TOKENS * 15 * 2),
        ("hidden", {"projection": "teacher"}, 2 * 2 * 2 * TOKENS * 15 * 24, 2 * TOKENS * 15 * 2),
        # Scores of the student's heads, their two gradients, and the teacher's scores of as many heads.
        ("attention", {}, 2 * 2 * TOKENS * SEQ_LEN * 3 * (3 * 4 + 6), 2 * 2 * TOKENS * 3 * 4 * 2),
        ("cosine", {}, 3 * 2 * TOKENS * 15 * 24, TOKENS * (15 * 2 + 2 * 24 * 4 + 2 * 4 + 8)),
        # Queries, keys and values of all heads of one layer.
        ("relations", {}, 2 * TOKENS * SEQ_LEN * (3 * 3 * 13 + 4 * 18), TOKENS * 2 * 3 * 13 * 2),
        ("mlm", {}, 0, ROWS * VOCAB * (2 * 2)),
        ("kl", {}, 0, ROWS * VOCAB * (2 * 2 + 4)),
        ("kl", {"kl_positions": "all"}, 0, 0),
    ],
)
def test_each_term_counts_its_own(name, options, flops, saved):
    term = the_term(name, **options)
    assert (term.flops(SIZES), term.saved_bytes(SIZES)) == (flops, saved)


def test_rows_of_the_head_and_logits_that_are_kept():
    every = SEQUENCES * SEQ_LEN
    expected = {
        ("mlm",): ((ROWS, 0), ROWS),
        ("kl",): ((ROWS, ROWS), ROWS),
        ("mlm", "kl"): ((ROWS, ROWS), ROWS),
    }
    for names, (rows, kept) in expected.items():
        (term,) = active_terms(LossConfig().only(**dict.fromkeys(names, 1.0)))
        assert (term.head_rows(SIZES), term.logit_rows(SIZES)) == (rows, kept)
    term = the_term("kl", kl_positions="all")
    assert (term.head_rows(SIZES), term.logit_rows(SIZES)) == ((every, every), 0)


def test_every_weight_of_the_config_has_a_term():
    names = [field.name for field in dataclasses.fields(LossConfig) if field.name in registered()]
    pooled = dict.fromkeys(("pooled_cosine", "pooled_mse", "pooled_similarity"), 1.0)
    scores = dict.fromkeys(("scores_kl", "scores_mse", "labels"), 1.0)
    assert list(LossConfig(cosine=1.0, relations=1.0, **pooled, **scores).weights) == names and len(names) == 13


def test_only_the_terms_with_a_weight_are_asked():
    objective = Objective(LossConfig().only(mlm=1.0))
    assert objective.needs == {"logits"} and not objective.needs_teacher
    assert Objective(LossConfig().only(kl=1.0)).needs_teacher
    assert not Objective(LossConfig().only(embedding=1.0, attention=1.0)).needs_last_layer


# -- from outside


@pytest.fixture
def no_strangers(monkeypatch):
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(terms, "_REGISTERED", dict(terms._REGISTERED))


class Margin(Term):
    """On the logits, like KL, and with a W of its own in every layer."""

    names = ("margin", "drift")
    needs = frozenset({"hidden", "logits"})

    def on_last_layer(self, student, teacher, step):
        return self.module(step, "last")(student.hidden, teacher.hidden, step.batch.attention_mask)

    def at_end(self, last, step):
        if step.teacher is None:
            return None
        ours = step.student.lm_logits(last.flatten(0, 1).index_select(0, step.batch.target_index))
        return self.weighted({"drift": (ours - step.teacher.logits("masked")).square().mean()})

    def modules(self, layer_map, hidden_size) -> dict[str, nn.Module]:
        return {"last": Projection(layer_map.hidden_size, self.loss)}


@pytest.mark.parametrize("lock_step", [True, False])
def test_a_term_with_modules_and_logits_beside_the_packages_own(no_strangers, lock_step):
    register(Margin)
    plain = LossConfig(kl=1.0)
    with_term = dataclasses.replace(plain, extra={"margin": 2.0, "drift": 3.0})
    batch, found = small_batch(), []
    for loss in (plain, with_term):
        student, teacher = Student(small_model(seed=1), loss), Teacher(small_model(), lock_step)
        found.append(student(batch, teacher(batch)))
    names = list(dict(student.projections.named_children()))
    assert names == ["embedding", "layer_0", "layer_1", "layer_2", "margin_last"]
    uses = {use.parameter for use in student.axis_table().uses if not use.scored}
    assert "projections.margin_last.weight" in uses
    (total, values), (with_total, with_values) = found
    assert all(torch.equal(values[name], with_values[name]) for name in values)  # KL reads the same teacher as before
    assert with_values["margin"] > 0 and with_values["drift"] > 0
    more = 2 * with_values["margin"] + 3 * with_values["drift"]
    torch.testing.assert_close(with_total, total + more, rtol=1e-5, atol=1e-6)
    with_total.backward()
    assert student.projections["margin_last"].weight.grad is not None
    student.predict(batch)  # nothing is compared: its module is passed by


def test_what_cannot_be_registered(no_strangers):
    def named(*names: str, needs=frozenset()):
        return type("Odd", (Term,), {"names": names, "needs": needs, "__module__": "odd"})

    with pytest.raises(ValueError, match="'kl' is taken by homodistil.distill.losses.vocabulary.Vocabulary"):
        register(named("kl"))
    with pytest.raises(ValueError, match="'a/b' is no name"):
        register(named("a/b"))
    with pytest.raises(ValueError, match=r"needs: \['gradients'\] unknown"):
        register(named("odd", needs=frozenset({"gradients"})))
    assert register(named("odd")) and register(named("odd"))  # a module that is imported again


def test_a_plugin_that_fails_is_refused_each_time_in_one_line(tmp_path):
    (tmp_path / "broken.py").write_text("raise RuntimeError('two\\nlines')")
    for _ in range(2):
        with pytest.raises(UserError, match=r"cannot import '.*broken.py' \(RuntimeError: two lines\)") as caught:
            load_plugins([str(tmp_path / "broken.py")], "loss.plugins")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot import 'nowhere.py' .FileNotFoundError"):
        load_plugins(["nowhere.py"], "loss.plugins")
