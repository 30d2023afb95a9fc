"""What the tables of the studies say."""

from __future__ import annotations

import json

import pytest
from study_fakes import FakePool, measured, study_options

from experiments.quality import ablation, ablation_tables
from experiments.quality.arms import ARMS, DEFAULT_ARM
from experiments.quality.comparison import Comparison, Entry
from experiments.quality.comparison_tables import report, rows
from experiments.quality.gap_study import curves, jumps, mean_over_steps
from experiments.quality.statistics import difference


def _entry(name: str, losses: list[float], cosine: list[float] | None = None, **tasks: list[float]):

    entry = Entry(ARMS[name], "half", {0.003: 4.25, 0.006: None}, 0.003)
    entry.runs = {seed: measured(9.0, loss) for seed, loss in enumerate(losses)}
    entry.tasks = tasks
    entry.probes = {"cosine": cosine} if cosine else {}
    return entry


def test_the_tables_of_the_comparison(tmp_path):

    ours = _entry(DEFAULT_ARM, [4.0, 4.01, 4.02], [0.6, 0.61, 0.62], stsb=[0.7, 0.72, 0.74])
    rival = _entry("one_shot", [4.1, 4.11, 4.12], [0.4, 0.5, 0.6], stsb=[0.71, 0.72, 0.73])
    teacher = measured(9.0, 3.5, parameters=5000)
    found = Comparison([ours, rival], teacher, {"stsb": [0.8, 0.8, 0.8]}, {"cosine": [0.7]})
    text = report(found, study_options(tmp_path, "main"), {"x lr 1": "ValueError: y"})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    by_name = {line[0]: line for line in reversed(lines) if line[1:2] != ["half"]}  # not those of the verdict

    assert text.index("## Verdict") < text.index("## Width")
    assert by_name[ARMS["one_shot"].label][:6] == [
        ARMS["one_shot"].label,
        "1,000",
        "0.003",
        "4.110 +- 0.010",
        "0.2433 +- 0.0006",
        "0.411 +- 0.001",
    ]
    assert by_name[ARMS["one_shot"].label][6:10] == ["0.500 +- 0.100", "-", "-", "-"]  # frozen features
    assert by_name[ARMS["one_shot"].label][10:] == ["0.720 +- 0.010", "-", "500 +- 0", "10 +- 0", "2.00 +- 0.00"]
    assert by_name["teacher (corrected)"][1:4] == ["5,000", "-", "3.500"]
    assert by_name["teacher (corrected)"][6:8] == ["0.700", "-"]
    verdicts = {line[2]: line[3:] for line in lines if line[0] == ARMS["one_shot"].label and line[1] == "half"}
    assert verdicts["held-out MLM loss"] == ["-0.100", "0.028", "yes"]
    assert verdicts["STS-B Spearman"] == ["+0.000", "0.045", "no"]
    assert verdicts["frozen: STS-B cosine"] == ["+0.110", "0.201", "no"]
    assert "by more than two standard deviations of the difference, in: held-out MLM loss," in text
    assert f"* in STS-B Spearman than: {ARMS['one_shot'].label} at half width\n" in text
    assert by_name[f"{DEFAULT_ARM}/half"] == [f"{DEFAULT_ARM}/half", "0.003: 4.250; 0.006: -", "0.003", "-"]
    assert "* x lr 1: ValueError: y" in text and "HomoBERT-tiny" in by_name

    made = {(r["variant"], r["metric"]): r for r in rows(found, {"command": "the command"})}
    assert made["one_shot", "mlm_loss"]["values"] == [4.1, 4.11, 4.12]
    assert made["one_shot", "mlm_loss"]["value"] == 4.11 and made["one_shot", "mlm_loss"]["x"] == "half"


def test_our_other_form_is_no_rival(tmp_path):

    other = next(arm.name for arm in ARMS.values() if arm.is_ours and arm.name != DEFAULT_ARM)
    entries = [_entry(DEFAULT_ARM, [4.0, 4.0]), _entry(other, [3.0, 3.0]), _entry("mlm_only", [5.0, 5.0])]
    text = report(Comparison(entries, {}), study_options(tmp_path, "main", "--no-tune"), {})
    assert "better than every rival" in text and "(own form)" in text and "NOT better" not in text


def test_the_gap_is_told_in_the_order_in_which_it_was(tmp_path):

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

    some = ("importance", "projection", "events", "compensation")
    monkeypatch.setattr(ablation, "VARIANTS", {group: ablation.VARIANTS[group] for group in some})
    options = study_options(tmp_path, "ablate", "--base", "homodistil", "--rates", "0.003", "0.006", "0.012")

    def outcome(name: str, rate: float, seed: int):
        return measured({0.003: 4.3, 0.006: 4.1, 0.012: 4.2}[rate], 4.0 + seed)

    class Pool(FakePool):
        def run(self, phase, jobs, later=None):
            if phase != "ablation":
                return super().run(phase, jobs, later)
            change = {"random": 0.3}
            self.asked += [job.label for job in jobs]
            return [
                measured(9, 4.0 + job.spec.config().train.seed + change.get(job.spec.config().pruning.importance, 0))
                for job in jobs
            ]

    pool = Pool(outcome, tmp_path)
    found = ablation.run(pool, options)
    base = found.base["half"]
    assert base.rate == 0.006
    names = {variant.name: variant for variant in found.variants}
    assert "sensitivity" not in names and "student's side, learned" not in names and "gradual, none" not in names
    assert difference(names["random"].runs, base.runs, "mlm_loss") == pytest.approx((0.3, 0.0, 3))
    assert all("lr 0.006" in label for label in pool.asked if isinstance(label, str))
    text = ablation_tables.report(found, options, {})
    assert "| random | 5.300 +- 1.000 | +0.300 +- 0.000 * |" in text
    intervals = {name: names[name].runs for name in ("twice as many", "half as many")}
    assert all(len(runs) == 3 for runs in intervals.values())


def test_a_variant_that_the_product_refuses_is_named_with_its_reason(tmp_path, monkeypatch):

    monkeypatch.setattr(ablation, "VARIANTS", {"projection": ablation.VARIANTS["projection"]})
    options = study_options(tmp_path, "ablate", "--base", "ours_gradual", "--rates", "0.003", "0.006", "0.012")

    class Pool(FakePool):
        def run(self, phase, jobs, later=None):
            if phase != "ablation":
                return super().run(phase, jobs, later)
            return [measured(9, 4.0) for _ in jobs]

    found = ablation.run(Pool(lambda name, rate, seed: measured(4.0, 4.0), tmp_path), options)
    runs = {variant.name: len(variant.runs) for variant in found.variants}
    assert runs == {"student's side, frozen": 0, "teacher's side, learned": 3, "teacher's side, frozen": 0}
    text = ablation_tables.report(found, options, {})
    assert "* student's side, frozen: refused. loss.projection_learned: found false" in text
