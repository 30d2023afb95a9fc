"""Whole small runs with pruning.schedule=gap and pruning.importance=teacher_kl: real engine, checkpoints, text."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from support.small import plain_run, small_batch, small_model, small_pair

from homodistil.config.rules import check
from homodistil.config.schema import PruningConfig, RunConfig
from homodistil.distill.snapshot import StudentSnapshots, duplicate
from homodistil.engine.build import init_ranks, resolve_engine_config
from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.resize_plan import make_plan, slice_module
from homodistil.pruning.calibration import drawn_label_loss
from homodistil.pruning.importance import Importance
from homodistil.training.gradient_scores import score_by_drawn_labels
from homodistil.training.inputs import prepare_inputs
from homodistil.training.run import DistillationRun

STEPS = 40


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tokenizer):
    """A small teacher's folder and a text."""
    folder = tmp_path_factory.mktemp("parts")
    small_model(vocab_size=len(tokenizer), initializer_range=0.1).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    draw = random.Random(0)
    words = "the a whale ship sea captain white old sails deep over under and harpoon storm night crew of".split()
    lines = (" ".join(draw.choices(words, k=12)) for _ in range(600))
    (folder / "text.txt").write_text("\n\n".join(lines))
    return folder


def make_config(parts: Path, **pruning) -> RunConfig:
    config = plain_run()
    config.teacher.name, config.data.sources = str(parts / "teacher"), [str(parts / "text.txt")]
    config.data.text_documents, config.data.seq_len, config.data.cache_dir = "paragraph", 16, str(parts / "cache")
    student = config.student
    student.hidden_size, student.intermediate_size, student.num_attention_heads = 12, 16, 4
    config.given = frozenset({"train.lr"})  # the default itself, not one by the width
    config.train.steps, config.train.global_batch_size, config.train.micro_batch_size = STEPS, 8, 8
    config.train.save_every_steps, config.run.keep_checkpoints = 10, 9
    values = {"end_fraction": 0.8, "interval_steps": 2, "ffn_multiple": 4, "calibration_batches": 2} | pruning
    for name, value in values.items():
        setattr(config.pruning, name, value)
    check(config)
    return config


def distil(config: RunConfig, folder: Path, stage: int) -> DistillationRun:
    device = init_ranks()
    engine = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    run = DistillationRun(
        config, resolve_engine_config(engine, config.train, 1), prepare_inputs(config, device), folder, "test"
    )
    run.row = run.run()
    return run


def events_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def without_times(events: list[dict]) -> list[dict]:
    return [{name: value for name, value in event.items() if name != "milliseconds"} for event in events]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.full)])
def closed_loop(request, parts, tmp_path_factory):
    folder, trials = tmp_path_factory.mktemp("closed_loop") / "run", []
    config = make_config(parts, schedule="gap", gap_bound=0.005, gap_recovery=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("homodistil.training.trial_cuts.TrialCuts.kl_after", remembering(trials))
        run = distil(config, folder, request.param)
    return config, folder, run, trials, request.param


def remembering(trials: list[float]):
    from homodistil.training.trial_cuts import TrialCuts

    kl_after = TrialCuts.kl_after

    def remember(self, due) -> float:
        trials.append(kl_after(self, due))
        return trials[-1]

    return remember


def test_the_closed_loop_reaches_its_target_and_keeps_its_bound_or_says_where_not(closed_loop):
    config, folder, run, _, _ = closed_loop
    events = events_of(folder)
    last = events[-1]["widths_after"]
    assert (last["hidden"], last["layer.0.ffn"], last["layer.2.qk_dim"]) == (12, 16, 3)
    assert len(events) > 5 and events[-1]["step"] <= 0.8 * STEPS
    for event in events:
        rise = event["gap_after"]["kl"] - event["gap_before"]["kl"]
        assert event["gap_rise"] == rise and event["gap_bound"] == 0.005
        assert event["gap_bound_kept"] == (rise <= 0.005)
        assert event["gap_bound_kept"] or event["gap_forced"]
    kept = sum(event["gap_bound_kept"] for event in events)
    assert 1 < kept < len(events), "a run with both kinds was meant"
    above = [event["step"] for event in events if not event["gap_bound_kept"]]
    row = json.loads((folder / "row.json").read_text())
    assert row["gap_events"] == len(events) and row["gap_events_above_bound"] == above


def test_a_trial_gives_the_very_number_that_the_event_gives(closed_loop):
    _, folder, _, trials, _ = closed_loop
    after = [event["gap_after"]["kl"] for event in events_of(folder)]
    assert len(trials) > len(after) and set(after) <= set(trials)


def test_a_resumed_run_has_the_same_events(closed_loop, tmp_path):
    config, folder, _, _, stage = closed_loop
    shutil.copytree(folder, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("step-0000[234]0"):
        shutil.rmtree(path)
    (tmp_path / "run" / "row.json").unlink()
    distil(config, tmp_path / "run", stage)
    events = without_times(events_of(tmp_path / "run"))
    assert events == without_times(events_of(folder))
    assert any(event["step"] <= 10 for event in events) and any(event["step"] > 10 for event in events)


def test_gradual_pruning_by_the_teachers_own_labels(parts, tmp_path):
    run = distil(make_config(parts, importance="teacher_kl", interval_steps=8), tmp_path / "run", 2)
    events = events_of(tmp_path / "run")
    assert events[-1]["widths_after"]["hidden"] == 12
    # Two batches before each event, and none from training.
    assert run.pruner.importance.num_updates == 2 * len(events)


def test_a_duplicate_has_hooks_of_its_own():
    student, teacher = small_pair()
    copied, batch = duplicate(student), small_batch()
    with torch.no_grad():
        copied.model.bert.encoder.layer[1].output.dense.weight.mul_(1.5)
    ours, theirs = student(batch, teacher(batch)).terms, copied(batch, teacher(batch)).terms
    assert ours.keys() == theirs.keys() and ours["kl"].abs() < 1e-6 < theirs["kl"] and theirs["hidden"] > 0.01


def test_a_plain_copy_computes_what_the_student_does_at_todays_widths():
    student, teacher = small_pair()
    copies = StudentSnapshots(student)
    keep = {"hidden": torch.arange(3, 20), "layer.1.heads": torch.tensor([0, 2]), "layer.0.ffn": torch.arange(9)}
    plan = make_plan(student.axis_table(), keep)
    slice_module(student, plan)
    student.after_resize(plan.keep)
    weights = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    copied, batch = copies.make(weights, torch.float32), small_batch()
    assert copied.widths == student.widths
    for name, value in student(batch, teacher(batch)).terms.items():
        assert torch.equal(copied(batch, teacher(batch)).terms[name], value), name


def test_teacher_kl_scores_are_those_of_a_naive_float64_loop():
    student, teacher = small_pair()
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.mul_(1.1)
    config = PruningConfig(importance="teacher_kl", ema_beta=0.5)
    importance = Importance(student.axis_table(), config, seed=0, device=torch.device("cpu"))
    batches = [small_batch(0), small_batch(1)]
    score_by_drawn_labels(importance, student, teacher, iter([batches]), (0, 7))
    labels = torch.Generator().manual_seed(7 * 4096)
    model = small_model().double()
    model.load_state_dict(student.model.state_dict())
    with torch.no_grad():
        drawn = [torch.multinomial(teacher.predict(b).softmax(-1), 1, generator=labels).squeeze(1) for b in batches]
    for batch, wanted in zip(batches, drawn, strict=True):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
        log_shares = logits[batch.target_index].log_softmax(-1)
        (-log_shares[torch.arange(len(wanted)), wanted].mean() / 2).backward()
    scores = importance.scores()
    for axis, expected in naive_scores(model).items():
        # fp32 gradients against fp64 ones; half of the sums after one update of an average with beta .5.
        torch.testing.assert_close(scores[axis].double(), 0.5 * expected, rtol=2e-4, atol=1e-7)


def naive_scores(model) -> dict[str, torch.Tensor]:
    parameters, found = dict(model.named_parameters()), {}
    table = bert.axis_table(model)
    for use in table.uses:
        for position, axis in enumerate(use.axes):
            values = (parameters[use.parameter] * parameters[use.parameter].grad).abs().detach()
            values = values.movedim(use.dim, 0).reshape(values.shape[use.dim], -1).sum(1)
            if len(use.axes) == 2:
                values = values.view(table.widths[use.axes[0]], -1)
                values = values.sum(1) if position == 0 else values
            found[axis] = found.get(axis, 0) + values
    return found


def test_drawn_labels_follow_the_teachers_distribution():
    """At student = teacher the expected loss is the teacher's entropy, whatever the data's labels are."""
    student, teacher = small_pair()
    batch = small_batch(lengths=(16,) * 40)
    loss = drawn_label_loss(student, teacher, seed=3)
    with torch.no_grad():
        mean = torch.stack([loss(batch) for _ in range(10)]).mean()
        shares = teacher.predict(batch).double().log_softmax(-1)
    entropy = -(shares.exp() * shares).sum(-1).mean()
    spread = (shares.exp() * shares.square()).sum(-1).sub(entropy**2).abs().mean().sqrt() / (10 * len(shares)) ** 0.5
    assert abs(mean - entropy) < 5 * spread
