"""The study of the forms of the cut: its arms and rates, what is left out, its page, and a tiny one from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from study_fakes import FakePool, measured, study_options
from support.tiny_decoder import write_decoder, write_text
from transformers import BertConfig, LlamaConfig

from experiments.quality import refit_study, refit_tables
from experiments.quality.arms import BASE, EARLY, FULL, ONE_SHOT, OUR_WEIGHTS, SHAPES
from experiments.quality.availability import outlook
from experiments.quality.decoder_arms import DECODER_BASE
from experiments.quality.jobs import RESULT_FILE, Keep
from experiments.quality.pool import Pool, spawner
from experiments.quality.refit_arms import REFERENCE, REFIT_ARMS
from experiments.quality.refit_study import Cell, RefitStudy
from experiments.quality.specs import RunSpec, Shape
from experiments.quality.study_teacher import BERT_TINY, StudyTeacher, proportional, study_teacher
from homodistil.errors import UserError
from homodistil.models.known_configs import known_config

ROOT = Path(__file__).resolve().parents[2]
TINY = BertConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2)
TEACHER = StudyTeacher(BERT_TINY, TINY, BASE, None)


@pytest.fixture(autouse=True)
def _teacher(request, monkeypatch):
    """Whoever asks for the teacher of the study gets BERT-tiny's configuration, but in the study that is real."""
    if "cache_dir" not in request.fixturenames:
        monkeypatch.setattr(refit_study, "study_teacher", lambda options, work: TEACHER)


def _options(tmp_path, *arguments: str):
    return study_options(tmp_path, "refit", "--widths", "half", *arguments)


def test_every_arm_is_there_or_its_refusal(tmp_path):
    study = refit_study.plan(_options(tmp_path), TEACHER)
    assert len(REFIT_ARMS) == 12 and REFERENCE in REFIT_ARMS
    assert {cell.arm.name for cell in study.cells} | set(study.refused) == set(REFIT_ARMS)
    assert {f"{form}_{pace}" for form in ("full", "refit", "none") for pace in ("one_shot", "gradual")}.isdisjoint(
        study.refused
    )
    for reason in study.refused.values():  # what the product does not have yet says so by its field
        assert reason.startswith(("pruning.compensation: ", "pruning.basis: "))
    assert [(cell.length, cell.width) for cell in study.cells] == sorted((c.length, c.width) for c in study.cells)


@pytest.mark.parametrize(("name", "fields"), [("full_gradual", EARLY), ("full_one_shot", ONE_SHOT)])
def test_the_shortest_runs_are_those_of_the_other_studies(tmp_path, name, fields):
    cell = Cell(REFIT_ARMS[name], "half", start=TEACHER.at_width("half"))
    here = refit_study.job(_options(tmp_path), TEACHER, cell, 3e-3, 0).spec
    there = RunSpec.of("x", BASE, SHAPES["half"].overrides, FULL, fields, OUR_WEIGHTS, steps=240, lr=3e-3, seed=0)
    assert here.key == there.key


@pytest.mark.parametrize("steps", [240, 100])
def test_all_lengths_and_the_cut_alone_have_the_same_events(tmp_path, steps):
    options = _options(tmp_path, f"--steps={steps}")
    for name in ("none_gradual", "full_one_shot"):
        cells = [Cell(REFIT_ARMS[name], "half", start=TEACHER.at_width("half"), length=n) for n in (1, 4, 16)]
        short, middle, long = (_events(refit_study.job(options, TEACHER, cell, 1e-3, 0)) for cell in cells)
        cut = refit_study.cut_job(options, TEACHER, cells[0], 0)
        assert _events(cut) == short and cut.spec.config().train.lr == 1e-9
        assert cut.spec.config().train.steps < 0.2 * steps
        assert len(short) == len(middle) == len(long) and short[-1][1] == long[-1][1] == 64


def _events(job) -> list[tuple[int, int]]:
    """(First step, hidden size) of each phase."""
    resolved = outlook(job.spec, TINY).resolved
    return [(phase.first_step, phase.widths["hidden"]) for phase in resolved.phases]


class _Pool(FakePool):
    """Answers by (arm, stage), rate and seed."""

    errors: dict = {}

    def __init__(self, work: Path, best: dict) -> None:
        super().__init__(self._answer, work)
        self._best = best
        """(Arm, stage) -> its best rate."""

    def _answer(self, label: str, rate: float, seed: int) -> dict:
        arm, _, stage = label.split("/")
        loss = {"cut": 6.0, "x1": 5.0, "x4": 4.0}[stage] + 0.01 * seed
        form = arm.removesuffix("_one_shot").removesuffix("_gradual")
        loss += {"none": 0.5, "refit": 0.2, "full": 0.0}.get(form, 0.3) * (-1 if stage == "x4" else 1)
        return measured(loss + 50 * abs(rate - self._best.get((arm, stage), rate)), loss)


ARMS = ("none_one_shot", "full_one_shot")


def test_rates_follow_those_of_the_length_before(tmp_path):
    best = {("none_one_shot", "x1"): 6e-3, ("full_one_shot", "x1"): 1.5e-3, ("none_one_shot", "x4"): 1.2e-2}
    best[("full_one_shot", "x4")] = 3e-4
    pool = _Pool(tmp_path, best)
    options = _options(tmp_path, "--lengths", "1", "4", "--arms", *ARMS)
    study = refit_study.run(pool, options)

    def asked(label: str, phase: str) -> list[float]:
        return [rate for where, name, rate, _ in pool.asked if (where, name) == (phase, label)]

    assert asked("none_one_shot/half/x1", "rates") == [3e-3, 6e-3, 1.2e-2]
    assert asked("none_one_shot/half/x1", "further rates") == []
    assert asked("full_one_shot/half/x1", "further rates") == [7.5e-4]
    assert asked("none_one_shot/half/x4", "rates") == [3e-3, 6e-3]
    assert asked("none_one_shot/half/x4", "further rates") == [1.2e-2]
    assert asked("full_one_shot/half/x4", "rates") == [7.5e-4, 1.5e-3]
    assert asked("full_one_shot/half/x4", "further rates") == [3.75e-4]
    rates = {cell.label: cell.rate for cell in study.cells if cell.rate}
    assert rates["none_one_shot/half/x4"] == 1.2e-2 and rates["full_one_shot/half/x4"] == 3.75e-4
    assert not any("x16" in name or "gradual" in name for _, name, _, _ in pool.asked) and not study.left_out
    # The first seed chooses; the others only see what was chosen, the reference first.
    later = [(name, rate) for phase, name, rate, seed in pool.asked if phase == "seed 2"]
    assert later[0] == ("full_one_shot/half/x1", 1.5e-3) and all(rates[name] == rate for name, rate in later)
    assert {len(cell.runs) for cell in study.cells if cell.rate} == {3}


def test_what_does_not_fit_is_named_and_what_is_there_is_shown(tmp_path):
    options = _options(tmp_path, "--table", "--seeds", "0", "--lengths", "1", "--arms", *ARMS)
    cell = Cell(REFIT_ARMS["full_one_shot"], "half", start=TEACHER.at_width("half"))
    for rate in (1.5e-3, 3e-3, 6e-3):
        folder = refit_study.job(options, TEACHER, cell, rate, 0).folder(tmp_path)
        folder.mkdir(parents=True)
        (folder / RESULT_FILE).write_text(json.dumps(measured(5.0, 5.0)))
    pool = _Pool(tmp_path, {("full_one_shot", "x1"): 3e-3})
    study = refit_study.run(pool, options)
    assert {name for _, name, _, _ in pool.asked} == {"full_one_shot/half/x1"}
    assert set(study.left_out) == {f"{name}/half/x1: cut alone" for name in ARMS} | {"none_one_shot/half/x1: rates"}
    text = refit_tables.report(study, options, {})
    assert "full, one-shot | 0.003 | - | 5.000" in text and "* none_one_shot/half/x1: rates" in text


def test_the_page_says_whether_the_order_changes(tmp_path):
    options = _options(tmp_path, "--lengths", "1", "4", "--arms", "refit_one_shot", *ARMS)
    study = refit_study.run(_Pool(tmp_path, {("refit_one_shot", "x1"): 7.5e-4}), options)
    study.refused["project_one_shot"] = "pruning.compensation: found 'project'"
    text = refit_tables.report(study, options, {})
    best = "Best: cut alone: full, one-shot; x1: full, one-shot; x4: selection, one-shot."
    assert best in text
    assert "| selection, one-shot | +0.500 +- 0.000 * (3) | +0.500 +- 0.000 * (3) | -0.500 +- 0.000 * (1) |" in text
    assert "| full, one-shot | 0 (1) | 0 (1) | 0 (3) |" in text
    assert "| refit, one-shot | 0.00075 (end) | 6.210 +- 0.010 | 5.210 +- 0.010 | +0.200 +- 0.000 * |" in text
    assert "* project_one_shot: pruning.compensation: found 'project'" in text and "nan" not in text
    rows = {(row["variant"], row["metric"], row["x"]): row for row in refit_tables.rows(study, {})}
    assert rows["none_one_shot", "mlm_loss", "half x4"]["values"] == pytest.approx([3.5, 3.51, 3.52])
    assert rows["none_one_shot", "kl_to_teacher", "half cut alone"]["seeds"] == [0, 1, 2]


class _TuningPool(_Pool):
    def run(self, phase, jobs, later=None) -> list:
        if phase != "fine-tuning":
            return super().run(phase, jobs, later)
        assert all(job.of.keep is Keep.YES and job.of.spec.config().train.seed == job.seed for job in jobs)
        return [{"score": 0.8 - 0.1 * job.label.startswith("none") + 0.01 * job.seed} for job in jobs]


def test_students_are_fine_tuned_with_the_seeds_of_their_runs(tmp_path):
    pool = _TuningPool(tmp_path, {})
    options = _options(tmp_path, "--lengths", "1", "--arms", *ARMS, "--tasks", "stsb", "--task-rate", "2e-4")
    study = refit_study.run(pool, options)
    again = [(name, seed) for phase, name, _, seed in pool.asked if phase == "students to fine-tune"]
    assert sorted(again) == [(f"{name}/half/x1", seed) for name in sorted(ARMS) for seed in (0, 1, 2)]
    text = refit_tables.report(study, options, {})
    assert "## Fine-tuned: STS-B Spearman, width half\n\nExports of the x1 runs, learning rate 0.0002" in text
    assert "| selection, one-shot | 0.710 +- 0.010 | -0.100 +- 0.000 * | 3 |" in text and "movie" not in text
    rows = {(row["variant"], row["metric"], row["x"]): row for row in refit_tables.rows(study, {})}
    assert rows["full_one_shot", "stsb", "half fine-tuned"]["values"] == pytest.approx([0.8, 0.81, 0.82])


def test_ranks_are_of_the_seeds_that_the_reference_has_too():
    few, many = {1: measured(9, 5.0)}, {0: measured(9, 4.0), 1: measured(9, 5.1)}
    levels = refit_tables._levels({REFERENCE: many, "none_one_shot": few}, "mlm_loss")
    assert levels == pytest.approx({REFERENCE: 0.0, "none_one_shot": -0.1})  # 5.0 is more than the mean of 4.55
    assert refit_tables._levels({"none_one_shot": few}, "mlm_loss") == {"none_one_shot": 5.0}


def test_a_study_without_results_has_a_page(tmp_path):
    text = refit_tables.report(RefitStudy([Cell(REFIT_ARMS[REFERENCE], "half")]), _options(tmp_path), {})
    assert text.startswith("# Which form") and "##" not in text


def test_students_are_a_factor_of_any_teacher(tmp_path):
    minilm = BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)
    assert proportional(minilm, 0.5) == Shape(192, 768, 6)
    assert proportional(minilm, 0.25) == Shape(96, 384, 3)
    for factor in (0.5, 0.25):
        shape = proportional(known_config("HuggingFaceTB/SmolLM2-135M"), factor)
        assert shape[:2] == (round(576 * factor), round(1536 * factor)) and shape.hidden_size % shape[2] == 0
    teacher = StudyTeacher("some", known_config("HuggingFaceTB/SmolLM2-135M"), DECODER_BASE, None)
    study = refit_study.plan(_options(tmp_path), teacher)
    assert {"full_one_shot", "refit_gradual", "none_one_shot"} <= {cell.arm.name for cell in study.cells}
    assert TEACHER.at_width("half")[len(BASE) :] == SHAPES["half"].overrides


def test_a_tiny_study_of_a_decoder_from_end_to_end(tmp_path, cache_dir):
    """Two of three layers of a small decoder, corrected; one form of the cut, alone and trained at two rates."""
    text = write_text(tmp_path / "text")
    teacher = write_decoder(tmp_path / "teacher", LlamaConfig, text, num_hidden_layers=3)
    arguments = ["--quick", "--steps=3", "--seeds", "0", "--rates", "1e-3", "--layers=2", f"--teacher={teacher}"]
    arguments += [
        f"--arms={REFERENCE}",
        "--set",
        f"data.sources=[{text}]",
        "data.seq_len=16",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]
    options = _options(tmp_path / "work", *arguments)
    start = spawner(options.work, ROOT / "ds_configs" / "zero2_fp32.json")
    with Pool(options.work, start, 1, lambda line: None) as pool:
        study = refit_study.run(pool, options)
    assert not pool.errors, (pool.errors, (options.work / "worker-0.log").read_text()[-3000:])
    trained = {cell.arm.name: cell for cell in study.cells if cell.runs}
    assert set(trained) == set(options.arms) and study.is_causal and not study.left_out
    for name, cell in trained.items():
        assert len(cell.validation) == 2 and cell.runs[0]["parameters"] == study.cut[name, "half"][0]["parameters"]
        assert cell.runs[0]["test"]["lm_loss"] != study.cut[name, "half"][0]["test"]["lm_loss"]
    report = refit_tables.report(study, options, pool.errors)
    assert "Does the order change? held-out loss, width half" in report and "nan" not in report

    def no_start(connection, number):
        raise AssertionError("a worker was started though all is done")

    with Pool(options.work, no_start, 1, lambda line: None) as pool:
        again = refit_study.run(pool, options)
    assert [(cell.label, cell.runs) for cell in again.cells] == [(cell.label, cell.runs) for cell in study.cells]


def test_first_layers_are_for_decoders_alone(tmp_path, cache_dir):
    options = _options(tmp_path, "--layers=1", "--set", f"data.cache_dir={cache_dir}")
    assert options.teacher == BERT_TINY
    with pytest.raises(UserError, match="--layers: only of a decoder"):
        study_teacher(options, tmp_path)
