"""W of an embedder's vectors behind the last step: the least-squares fit of all ranks' texts, where that is better."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.small import small_batch, small_model
from torch.nn.functional import cosine_similarity

from homodistil.config.schema import LossConfig, RunConfig
from homodistil.data.batch import Batch
from homodistil.distill.student import Student
from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.sentence_head import SentenceHead
from homodistil.models.sentence_modules import SentenceModules
from homodistil.pruning.compensation.student import VECTORS_WEIGHT
from homodistil.training import projection_fit

TEXTS = [small_batch(seed, (11, 9, 16, 5, 7)) for seed in range(16)]
HEAD = SentenceHead(SentenceModules())


@pytest.fixture
def student() -> Student:
    model = small_model()
    bert.drop_head(model)
    return Student(model, LossConfig().only(pooled_cosine=1.0)).eval()


@pytest.fixture
def written(student, monkeypatch) -> dict:
    """What is written to an engine, whose weights are those of `student`."""
    weights: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(projection_fit, "master_weights", lambda _: dict(student.named_parameters()))
    monkeypatch.setattr(projection_fit, "write_weights", lambda _, new: weights.update(new))
    return weights


def place(batch: Batch) -> int:
    """The same for a batch that has been moved to the device on which it is."""
    return batch.input_ids.data_ptr()


def fitted(student: Student, wanted) -> projection_fit.Fit:
    config = RunConfig()
    run_inputs = SimpleNamespace(device=torch.device("cpu"), loader=lambda *_: {40: TEXTS})
    teacher = SimpleNamespace(sentence_head=HEAD, pooled_states=wanted)
    return projection_fit.fit_vectors(config, run_inputs, student, teacher, SimpleNamespace(deepspeed=None), 40)


def test_it_is_a_least_squares_fit_judged_on_other_texts(student, written):
    """The teacher's states are a fixed linear map of the student's, and noise."""
    generator = torch.Generator().manual_seed(2)
    true = torch.randn(24, 24, generator=generator)
    states = [student.pooled_states(batch, "mean") for batch in TEXTS]
    noise = torch.randn(16, 5, 24, generator=generator)
    theirs = {place(b): s @ true.T + 0.1 * n for b, s, n in zip(TEXTS, states, noise, strict=True)}
    fit = fitted(student, lambda batch: theirs[place(batch)])

    x, y = torch.cat(states[:14]).double(), torch.cat([theirs[place(batch)] for batch in TEXTS[:14]]).double()
    start = student.projections["pooled_end"].weight.detach().double()
    weights = 1 / y.norm(dim=1, keepdim=True)
    x, y = x * weights, y * weights
    gram = x.T @ x
    regular = gram + projection_fit.RIDGE * gram.diagonal().mean() * torch.eye(24)
    expected = start + torch.linalg.solve(regular, x.T @ (y - x @ start.T)).T
    torch.testing.assert_close(written[VECTORS_WEIGHT].double(), expected, rtol=1e-3, atol=1e-3)

    others = torch.cat(states[14:]), torch.cat([theirs[place(batch)] for batch in TEXTS[14:]])
    for weight, cosine in ((start, fit.before), (expected, fit.after)):
        measured = cosine_similarity(others[0] @ weight.float().T, others[1]).mean().item()
        assert cosine == pytest.approx(measured, abs=1e-4)
    assert fit.after > fit.before


def test_it_stays_where_a_fit_is_no_better(student, written):
    """A W that is right already, and targets to fit to that say nothing."""
    right = {place(batch): student.embed(batch, HEAD) for batch in TEXTS[14:]}
    fit = fitted(student, lambda batch: right.get(place(batch), torch.randn(5, 24)))
    assert fit.before == pytest.approx(1) and fit.after < fit.before and not written


@pytest.mark.parametrize(
    ("steps", "fields", "expected"),
    [
        (4, {}, True),
        (3, {}, False),
        (4, {"projection_fit_texts": 0}, False),
        (4, {"projection_learned": False}, False),
        (4, {"pooled_cosine": 0.0, "pooled_similarity": 1.0}, False),
    ],
)
def test_runs_that_end_with_it(steps, fields, expected):
    config = RunConfig()
    config.train.steps, config.train.global_batch_size = steps, 16
    config.loss = LossConfig().only(pooled_cosine=1.0)
    for name, value in {"projection_fit_texts": 64, **fields}.items():
        setattr(config.loss, name, value)
    model = small_model()
    bert.drop_head(model)
    assert projection_fit.is_fitted(config, Student(model, config.loss)) is expected
