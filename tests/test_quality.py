"""The quality studies: rates are chosen on the right half, verdicts and tables are right, nothing is done twice."""

from __future__ import annotations

import math
import os
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True, scope="module")
def benchmarks_importable():
    # Last: a benchmark must not hide a package of the same name.
    sys.path.append(str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def _options(work: Path, *arguments: str):
    import argparse

    from study.options import add_arguments, options_of

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return options_of(parser.parse_args([*arguments, f"--work={work}"]))


def _measured(validation: float, test: float, **others) -> dict:
    def half(loss: float) -> dict:
        return {"mlm_loss": loss, "masked_top1": 1 / loss, "kl_to_teacher": loss / 10}

    found = {"validation": half(validation), "test": half(test), "parameters": 1000, "hidden_size": 64}
    return found | {"cpu_s": 10.0, "tokens_per_cpu_s": 500.0, "flops": 2e12} | others


class _FakePool:
    """Answers every training job with what `outcome` says of (arm, rate, seed)."""

    def __init__(self, outcome, work: Path) -> None:
        self.outcome, self.work, self.asked = outcome, work, []

    def run(self, phase, jobs, later=None) -> list:
        found = []
        for job in jobs:
            name, _, rate, _, seed = job.label.split()
            self.asked.append((phase, name, float(rate), int(seed)))
            found.append(self.outcome(name, float(rate), int(seed)))
        return found


# -- learning rates


def test_the_rate_is_chosen_on_the_validation_half_and_every_grid_is_extended_once(tmp_path):
    from study.arms import ARMS
    from study.comparison import Entry, run_seeds, try_rates

    # TEST would choose otherwise everywhere.
    losses = {
        "one_shot/half": {0.003: 4.3, 0.006: 4.1, 0.012: 4.2},
        "homodistil/half": {0.003: 4.3, 0.006: 4.2, 0.012: 4.1, 0.024: 4.0, 0.048: 3.0},
        "mlm_only/half": {0.0015: 4.5, 0.003: 4.0, 0.006: 4.1, 0.012: None},
    }

    def outcome(name: str, rate: float, seed: int):
        loss = losses[name][rate]
        return None if loss is None else _measured(loss, 10 - loss)

    options = _options(tmp_path, "main", "--no-tune", "--widths", "half")
    pool = _FakePool(outcome, tmp_path)
    entries = [Entry(ARMS[name], "half") for name in ("one_shot", "homodistil", "mlm_only")]
    try_rates(pool, options, entries)
    assert [entry.rate for entry in entries] == [0.006, 0.024, 0.003]
    assert [entry.extended for entry in entries] == [None, 0.024, 0.0015]  # not again to .048, which would be best
    assert {seed for _, _, _, seed in pool.asked} == {0}

    pool.asked.clear()
    run_seeds(pool, options, entries)
    assert [(name, rate) for _, name, rate, seed in pool.asked if seed == 2] == [
        ("one_shot/half", 0.006),
        ("homodistil/half", 0.024),
        ("mlm_only/half", 0.003),
    ]
    assert list(entries[0].runs) == [0, 1, 2]


def test_narrow_widths_have_a_grid_of_their_own_unless_one_is_given(tmp_path):
    from study.arms import ARMS
    from study.comparison import Entry, try_rates

    def outcome(name: str, rate: float, seed: int):
        return _measured(4 + abs(rate - 0.012), 4.0)

    def asked(*arguments: str) -> list[tuple[str, float]]:
        pool = _FakePool(outcome, tmp_path)
        options = _options(tmp_path, "main", "--no-tune", *arguments)
        try_rates(pool, options, [Entry(ARMS["one_shot"], width) for width in ("half", "quarter")])
        return [(name.split("/")[1], rate) for phase, name, rate, _ in pool.asked if phase == "learning rates"]

    assert asked() == [
        ("half", 0.003),
        ("half", 0.006),
        ("quarter", 0.006),
        ("half", 0.012),
        ("quarter", 0.012),
        ("quarter", 0.024),
    ]
    given = asked("--rates", "0.01", "0.02", "0.04")
    assert given == [(width, rate) for rate in (0.01, 0.02, 0.04) for width in ("half", "quarter")]


def test_a_method_whose_runs_all_failed_has_no_rate():
    from study.statistics import best_rate, extension

    assert best_rate({0.1: None, 0.2: math.nan}) is None
    assert extension({0.1: None, 0.2: None}) is None


# -- statistics


def test_a_verdict_needs_more_than_two_deviations_of_the_difference():
    from study.statistics import Spread, paired, spread, verdict

    assert spread([4.0, 4.1, 4.2]) == pytest.approx((4.1, 0.1, 3))
    assert spread([1.0, 3.0]).sd == pytest.approx(math.sqrt(2))  # n - 1
    # sqrt(.03^2 + .04^2) = .05, so .1 is exactly two of them.
    assert verdict(Spread(4.0, 0.03, 3), Spread(4.11, 0.04, 3), True) == pytest.approx((-0.11, 0.05, True))
    assert not verdict(Spread(4.0, 0.03, 3), Spread(4.09, 0.04, 3), True).is_better
    assert not verdict(Spread(4.0, 0.03, 3), Spread(4.11, 0.04, 3), False).is_better  # the other direction
    assert verdict(Spread(0.9, 0.01, 3), Spread(0.8, 0.01, 3), False).is_better
    assert not verdict(spread([4.0]), spread([9.0]), True).is_better  # one seed proves nothing
    assert paired([1.0, 2.0, 4.0], [0.5, 1.5, 3.5]) == pytest.approx((0.5, 0.0, 3))


def test_equal_compute_takes_the_dearer_measure_and_rounds_up():
    from study.compute_map import Cell, compute_ratio, longer_steps

    cell = Cell("half", 300)
    cell.gradual.runs = {0: _measured(4, 4, cpu_s=12.0, flops=5.0), 1: _measured(4, 4, cpu_s=14.0, flops=5.0)}
    cell.one_shot.runs = {0: _measured(4, 4, cpu_s=10.0, flops=4.0)}
    assert compute_ratio(cell) == pytest.approx(1.3)  # 13 / 10 CPU seconds, FLOPs only 1.25
    assert longer_steps(300, 1.3) == 390
    assert longer_steps(300, 1.301) == 405  # steps of 15
    cell.one_shot.runs = {0: _measured(4, 4, cpu_s=20.0, flops=8.0)}
    assert compute_ratio(cell) == 1.0


# -- halves and addresses


def test_the_halves_are_disjoint_cover_everything_and_take_turns():
    import numpy as np
    from study.measured_run import Part, halves

    from homodistil.materials import Materials

    @dataclass(frozen=True)
    class Corpus:
        heldout: object

    rows = torch.arange(21).view(7, 3).numpy()
    materials = Materials("teacher", None, Corpus(Part(rows, np.arange(7))), torch.device("cpu"))
    validation, test = (half.corpus.heldout for half in halves(materials))
    assert validation[range(len(validation))].tolist() == rows[:3].tolist()
    assert test[range(len(test))].tolist() == rows[3:].tolist()
    validation, test = (half.corpus.heldout for half in halves(materials, limit=2))
    assert validation[[0, 1]].tolist() == rows[:2].tolist() and len(validation) == 2
    assert test[[1]].tolist() == rows[[4]].tolist() and len(test) == 2

    blocks = np.arange(150)[:, None]  # sources lie one after the other: 64 here, 64 there, the rest here again
    materials = Materials("teacher", None, Corpus(Part(blocks, np.arange(150))), torch.device("cpu"))
    validation, test = (half.corpus.heldout for half in halves(materials))
    assert test[range(len(test))].flatten().tolist() == list(range(64, 128))
    assert validation[range(len(validation))].flatten().tolist() == [*range(64), *range(128, 150)]


def test_a_run_is_addressed_by_what_decides_its_result():
    from study.arms import ARMS, BASE, SHAPES
    from study.specs import RunSpec

    def key(*parts, steps: int = 5, lr: float = 3e-3, seed: int = 0) -> str:
        return RunSpec.of("x", BASE, SHAPES["half"].overrides, parts, steps=steps, lr=lr, seed=seed).key

    assert key() == key("run.name=another", "train.log_every_steps=1", "data.workers=2") == key("loss.kl=1.0")
    others = [key("loss.kl=0.5"), key(steps=6), key(lr=6e-3), key(seed=1), *map(key, ARMS["one_shot"].overrides)]
    assert len({key(), *others}) == len(others) + 1


def test_the_products_defaults_change_no_arm():
    """What the quickstart decides about pruning and losses is pinned, or a new default would rename all old results."""
    import yaml
    from study.arms import BASE

    from homodistil.cli import RECIPES

    pinned = {override.split("=")[0] for override in BASE}
    quickstart = yaml.safe_load((RECIPES / "quickstart.yaml").read_text())
    decided = {f"{section}.{name}" for section in ("pruning", "loss", "run") for name in quickstart.get(section, {})}
    assert decided - {"run.name"} <= pinned


def test_no_two_arms_are_the_same_run():
    from study.arms import ARMS, BASE, SHAPES
    from study.specs import RunSpec

    parts = ((BASE, SHAPES["half"].overrides, arm.overrides) for arm in ARMS.values())
    assert len({RunSpec.of("x", *part, steps=300, lr=3e-3, seed=0).key for part in parts}) == len(ARMS)


def test_rivals_have_the_losses_of_their_recipes():
    import dataclasses

    from study.arms import ARMS, BASE, SHAPES

    from homodistil import cli

    # What the table's notes say: everybody has an MLM head, and nobody pays for logits of all rows.
    differs = {"tinybert": {"mlm"}, "minilmv2": {"mlm"}, "distilbert": {"kl_positions"}}
    differs["distilbert_layers"] = differs["distilbert"]
    for arm in ARMS.values():
        if arm.recipe:
            shape = () if arm.own_shape else SHAPES["half"].overrides
            config, recipe = cli.parse([*BASE, *shape, *arm.overrides]), cli.parse([f"recipe={arm.recipe}"])
            ours, theirs = dataclasses.asdict(config.loss), dataclasses.asdict(recipe.loss)
            weights = ("mlm", "kl", "hidden", "attention", "embedding", "cosine", "relations")
            without = set() if ours["relations"] else {"relation_heads", "relation_layer"}
            if not (ours["hidden"] or ours["embedding"]):
                without |= {"projection", "projection_learned"}
            unlike = {name for name in ours if ours[name] != theirs[name]} - without
            assert unlike == differs.get(arm.name, set()), arm.name
            assert any(ours[name] for name in weights)
            assert config.pruning.schedule == recipe.pruning.schedule, arm.name
            assert config.student.num_hidden_layers == (1 if arm.own_shape else None)


# -- the queue


class _ThreadProcess:
    """A worker in a thread: does jobs that are named, fails at "bad", dies at "deadly"."""

    def __init__(self, connection: Connection, work: Path, done: list[str]) -> None:
        self._connection = Connection(os.dup(connection.fileno()))
        self._work, self._done = work, done
        self.exitcode = None
        self._thread = threading.Thread(target=self._work_off, daemon=True)
        self._thread.start()

    def _work_off(self) -> None:
        try:
            while True:
                job = self._connection.recv()
                self._done.append(job.name)
                if job.name == "deadly":
                    self.exitcode = -9
                    break
                if job.name == "bad":
                    self._connection.send((None, "ValueError: bad", 1.0))
                    break
                job.run(self)
                self._connection.send(({}, None, 60.0))
        except (EOFError, OSError):
            pass
        self._connection.close()

    @property
    def work(self) -> Path:
        return self._work

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    def kill(self) -> None:
        pass


def _named_job(name: str):
    return _NamedJob(name)


@dataclass(frozen=True)
class _NamedJob:
    """Quacks like `study.jobs.Job`; that class cannot be imported before the fixture has run."""

    name: str
    kind = "named"

    @property
    def label(self) -> str:
        return self.name

    def folder(self, work: Path) -> Path:
        return work / self.name

    def result(self, work: Path) -> dict | None:
        from study.jobs import Job

        return Job.result(self, work)

    def run(self, context) -> dict:
        from study.jobs import Job

        return Job.run(self, context)

    def execute(self, context, folder: Path) -> dict:
        assert not any(folder.iterdir())
        return {"name": self.name}


def test_jobs_are_done_in_order_once_and_a_failure_or_a_death_ends_nothing(tmp_path):
    from study.pool import Pool

    done, lines, starts = [], [], []

    def start(connection: Connection, number: int) -> _ThreadProcess:
        starts.append(number)
        return _ThreadProcess(connection, tmp_path, done)

    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "left over").touch()  # of an attempt that was interrupted
    names = ["a", "bad", "b", "deadly", "c", "a"]
    with Pool(tmp_path, start, 1, lines.append) as pool:
        found = pool.run("phase", [_named_job(name) for name in names], later={"named": 2})
    assert [result and result["name"] for result in found] == ["a", None, "b", None, "c", "a"]
    assert done == ["a", "bad", "b", "deadly", "c"]
    assert starts == [0, 0, 0]
    assert pool.errors == {"bad": "ValueError: bad", "deadly": "the worker died with exit code -9"}
    # After the first of five, 60 s each: four and the two of later phases are left.
    assert lines[0].endswith("phase 1/5 a: 60 s; about 6 min left")

    done.clear()
    with Pool(tmp_path, start, 1, lines.append) as pool:  # the same command again
        found = pool.run("phase", [_named_job(name) for name in ("a", "c", "new", "bad")])
    assert done == ["new", "bad"]
    assert "phase: 2 of 4 are there already" in lines
    assert [result and result["name"] for result in found] == ["a", "c", "new", None]


# -- tables


def _entry(name: str, losses: list[float], **tasks: list[float]):
    from study.arms import ARMS
    from study.comparison import Entry

    entry = Entry(ARMS[name], "half", {0.003: 4.25, 0.006: None}, 0.003)
    entry.runs = {seed: _measured(9.0, loss) for seed, loss in enumerate(losses)}
    entry.tasks = tasks
    return entry


def test_the_tables_of_the_comparison(tmp_path):
    from study.arms import ARMS, DEFAULT_ARM
    from study.comparison import Comparison
    from study.comparison_tables import report, rows

    ours = _entry(DEFAULT_ARM, [4.0, 4.01, 4.02], stsb=[0.7, 0.72, 0.74])
    rival = _entry("one_shot", [4.1, 4.11, 4.12], stsb=[0.71, 0.72, 0.73])
    teacher = _measured(9.0, 3.5, parameters=5000)
    found = Comparison([ours, rival], teacher, {"stsb": [0.8, 0.8, 0.8]})
    text = report(found, _options(tmp_path, "main"), "the command", {"x lr 1": "ValueError: y"})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    by_name = {line[0]: line for line in reversed(lines)}

    assert by_name[ARMS["one_shot"].label][:7] == [
        ARMS["one_shot"].label,
        "1,000",
        "0.003",
        "4.110 +- 0.010",
        "0.2433 +- 0.0006",
        "0.411 +- 0.001",
        "0.720 +- 0.010",
    ]
    assert by_name[ARMS["one_shot"].label][7:] == ["-", "500 +- 0", "10 +- 0", "2.00 +- 0.00"]
    assert by_name["teacher (corrected)"][1:4] == ["5,000", "-", "3.500"]
    verdicts = {line[2]: line[3:] for line in lines if line[0] == ARMS["one_shot"].label and line[1] == "half"}
    assert verdicts["held-out MLM loss"] == ["-0.100", "0.028", "yes"]
    assert verdicts["STS-B Spearman"] == ["+0.000", "0.045", "no"]
    assert "by more than two standard deviations of the difference, in: held-out MLM loss," in text
    assert f"* in STS-B Spearman than: {ARMS['one_shot'].label} at half width\n" in text
    assert by_name[f"{DEFAULT_ARM}/half"] == [f"{DEFAULT_ARM}/half", "0.003: 4.250; 0.006: -", "0.003", "-"]
    assert "* x lr 1: ValueError: y" in text and "HomoBERT-tiny" in by_name

    made = {(r["variant"], r["metric"]): r for r in rows(found, {"command": "the command"})}
    assert made["one_shot", "mlm_loss"]["values"] == [4.1, 4.11, 4.12]
    assert made["one_shot", "mlm_loss"]["value"] == 4.11 and made["one_shot", "mlm_loss"]["x"] == "half"


def test_our_other_form_is_no_rival(tmp_path):
    from study.arms import ARMS, DEFAULT_ARM
    from study.comparison import Comparison
    from study.comparison_tables import report

    other = next(arm.name for arm in ARMS.values() if arm.is_ours and arm.name != DEFAULT_ARM)
    entries = [_entry(DEFAULT_ARM, [4.0, 4.0]), _entry(other, [3.0, 3.0]), _entry("mlm_only", [5.0, 5.0])]
    text = report(Comparison(entries, {}), _options(tmp_path, "main", "--no-tune"), "the command", {})
    assert "better than every rival" in text and "(own form)" in text and "NOT better" not in text


def test_the_gap_is_told_in_the_order_in_which_it_was(tmp_path):
    import json

    from study.gap_study import curves, jumps, mean_over_steps

    metrics = [{"kind": "evaluation", "step": s, "gap/kl": v, "mlm_loss": 9} for s, v in ((0, 0.0), (4, 1.0), (8, 0.5))]
    events = [
        {"step": s, "gap_before": {"kl": b}, "gap_after": {"kl": a}} for s, b, a in ((0, 0.0, 2.0), (4, 0.8, 1.2))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in events))
    curve = curves(tmp_path)["kl"]
    assert curve == [(0, 0.0), (0, 0.0), (0, 2.0), (4, 0.8), (4, 1.2), (4, 1.0), (8, 0.5)]
    assert jumps(events) == pytest.approx([2.0, 0.4])
    assert mean_over_steps(curve) == pytest.approx((4 * 1.4 + 4 * 0.75) / 8)


def test_ablations_are_paired_by_seed_and_the_base_is_no_variant_of_itself(tmp_path, monkeypatch):
    from study import ablation
    from study.ablation_tables import difference, report

    some = ("importance", "projection", "events", "compensation")
    monkeypatch.setattr(ablation, "VARIANTS", {group: ablation.VARIANTS[group] for group in some})
    options = _options(tmp_path, "ablate", "--base", "homodistil", "--rates", "0.003", "0.006", "0.012")

    def outcome(name: str, rate: float, seed: int):
        return _measured({0.003: 4.3, 0.006: 4.1, 0.012: 4.2}[rate], 4.0 + seed)

    class Pool(_FakePool):
        def run(self, phase, jobs, later=None):
            if phase != "ablation":
                return super().run(phase, jobs, later)
            change = {"random": 0.3}
            self.asked += [job.label for job in jobs]
            return [
                _measured(9, 4.0 + job.spec.config().train.seed + change.get(job.spec.config().pruning.importance, 0))
                for job in jobs
            ]

    pool = Pool(outcome, tmp_path)
    found = ablation.run(pool, options)
    base = found.base["half"]
    assert base.rate == 0.006
    names = {variant.name: variant for variant in found.variants}
    assert "sensitivity" not in names and "student's side, learned" not in names and "gradual, none" not in names
    assert difference(names["random"], base, "mlm_loss") == pytest.approx((0.3, 0.0, 3))
    assert all("lr 0.006" in label for label in pool.asked if isinstance(label, str))
    text = report(found, options, "the command", {})
    assert "| random | 5.300 +- 1.000 | +0.300 +- 0.000 * |" in text
    intervals = {name: names[name].runs for name in ("twice as many", "half as many")}
    assert all(len(runs) == 3 for runs in intervals.values())


def test_a_variant_that_the_product_refuses_is_named_with_its_reason(tmp_path, monkeypatch):
    from study import ablation
    from study.ablation_tables import report

    monkeypatch.setattr(ablation, "VARIANTS", {"projection": ablation.VARIANTS["projection"]})
    options = _options(tmp_path, "ablate", "--base", "ours_gradual", "--rates", "0.003", "0.006", "0.012")

    class Pool(_FakePool):
        def run(self, phase, jobs, later=None):
            if phase != "ablation":
                return super().run(phase, jobs, later)
            return [_measured(9, 4.0) for _ in jobs]

    found = ablation.run(Pool(lambda name, rate, seed: _measured(4.0, 4.0), tmp_path), options)
    runs = {variant.name: len(variant.runs) for variant in found.variants}
    assert runs == {"student's side, frozen": 0, "teacher's side, learned": 3, "teacher's side, frozen": 0}
    text = report(found, options, "the command", {})
    assert "* student's side, frozen: refused. loss.projection_learned: found false" in text


# -- a real study


def test_a_real_study_of_two_methods(tmp_path, cache_dir):
    """3 steps each in a worker under DeepSpeed: both halves are measured right, and nothing is trained twice."""
    from study.arms import ARMS, BASE, SHAPES
    from study.jobs import ERROR_FILE, Keep, Train
    from study.measured_run import halves
    from study.options import QUICK
    from study.pool import Pool, spawner
    from study.specs import RunSpec

    from homodistil.materials import gather

    small = (*QUICK, "teacher.correction_steps=0", "data.sources=[embedded:moby-dick]", f"data.cache_dir={cache_dir}")
    jobs = [
        Train(
            RunSpec.of(name, BASE, SHAPES["half"].overrides, ARMS[name].overrides, small, steps=3, lr=1e-3, seed=1),
            Keep.YES,
            eval_blocks=6,
        )
        for name in ("one_shot", "homodistil")
    ]
    lines = []
    start = spawner(tmp_path, ROOT / "ds_configs" / "zero2.json")
    with Pool(tmp_path, start, 1, lines.append) as pool:
        one_shot, gradual = pool.run("tiny", jobs)
    assert not pool.errors, (pool.errors, (tmp_path / "worker-0.log").read_text()[-3000:])
    assert one_shot["parameters"] == gradual["parameters"] and one_shot["hidden_size"] == 64
    assert gradual["flops"] > 0 and gradual["cpu_s"] > 0 and gradual["tokens"] == 3 * 8 * 64
    assert not (jobs[0].folder(tmp_path) / "checkpoints").exists()

    materials = gather(jobs[0].spec.config(), torch.device("cpu"))
    for half, name in zip(halves(materials, 6), ("validation", "test"), strict=True):
        batches = half.heldout(jobs[1].spec.config())
        loss, kl = _by_stock_models(jobs[1].export(tmp_path), materials.teacher, batches)
        # The run measured in bf16: 8 bits of mantissa on each logit of about 10, averaged over 50 rows.
        assert gradual[name]["mlm_loss"] == pytest.approx(loss, abs=0.02)
        # The second run of the worker: the teacher's logits are those that the first one has left.
        assert gradual[name]["kl_to_teacher"] == pytest.approx(kl, abs=0.02)
    assert abs(gradual["validation"]["mlm_loss"] - gradual["test"]["mlm_loss"]) > 0.02  # or the check says nothing

    def no_start(connection: Connection, number: int):
        raise AssertionError("a worker was started though all is done")

    with Pool(tmp_path, no_start, 1, lines.append) as pool:
        assert pool.run("tiny", jobs) == [one_shot, gradual]
    assert not (jobs[0].folder(tmp_path) / ERROR_FILE).exists()


@torch.no_grad()
def _by_stock_models(export: Path, teacher: str, batches) -> tuple[float, float]:
    """(MLM loss, KL to the teacher), fp32, all positions."""
    from transformers import AutoModelForMaskedLM

    models = [AutoModelForMaskedLM.from_pretrained(folder).eval() for folder in (export, teacher)]
    loss, kl, rows = 0.0, 0.0, 0
    for batch in batches:
        outputs = [model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits for model in models]
        student, expected = (logits.flatten(0, 1)[batch.masked_index].double().log_softmax(-1) for logits in outputs)
        loss -= float(student.gather(1, batch.masked_labels[:, None]).sum())
        kl += float((expected.exp() * (expected - student)).sum())
        rows += len(batch.masked_labels)
    return loss / rows, kl / rows


def test_a_task_is_encoded_once_for_all_students_of_one_tokenizer(tmp_path, monkeypatch):
    from study import fine_tuning

    from homodistil.evaluation.glue import fine_tuning as glue
    from homodistil.evaluation.glue import sources

    encoded = []
    monkeypatch.setattr(sources, "load_task", lambda *_: "data")
    monkeypatch.setattr(glue, "encode", lambda checkpoint, *_: encoded.append(checkpoint.name) or checkpoint.name)
    for name, text in (("a", "same"), ("b", "same"), ("c", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(text)
        (tmp_path / name / "config.json").write_text(name)
    fine_tuning._encoded.cache_clear()
    found = [
        fine_tuning._encoded(fine_tuning._Tokenizer(tmp_path / name), task, False, tmp_path)
        for name, task in (("a", "stsb"), ("a", "movie"), ("b", "stsb"), ("b", "movie"), ("c", "movie"))
    ]
    fine_tuning._encoded.cache_clear()
    assert found == ["a", "a", "a", "a", "c"]
    assert encoded == ["a", "a", "c"]


def test_a_teacher_is_asked_once_for_each_batch():
    from study.measured_run import RememberedLogits

    asked = []

    def predict(batch):
        asked.append(batch)
        return torch.tensor([float(batch)])

    remembered = RememberedLogits()
    walks = [list(map(remembered.of(predict), batches)) for batches in ([3, 1], [3, 1, 2])]
    assert asked == [3, 1, 2] and walks[0] == walks[1][:2] == [3.0, 1.0] and walks[1][2] == 2.0
