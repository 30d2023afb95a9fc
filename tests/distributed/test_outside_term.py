"""A term from outside (outside_term.py: one class) in real jobs of two ranks: trained, logged, counted and planned."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from support.fork_server import ROOT
from support.small_job import TRAIN, arguments

from homodistil.config.schema import LossConfig
from homodistil.distill.cost import sequence_bytes, step_flops

PLUGIN = Path(__file__).with_name("outside_term.py")
PLAN = ROOT / "launcher" / "plan.py"
WITH_TERM = (f"loss.plugins=[{PLUGIN}]", "loss.extra={similarity: 0.5}")
ALONE = (
    f"loss.plugins=[{PLUGIN}]",
    "loss.extra={similarity: 1}",
    *(f"loss.{name}=0" for name in ("mlm", "kl", "hidden", "attention", "embedding")),
    *("student.init=random", "pruning.schedule=none", "train.lr=1e-2", "train.steps=30", "train.eval_every_steps=0"),
)


def _trained(server, run_inputs, folder: Path, *overrides: str) -> list[dict]:
    """Logged steps of the job, once it has ended well."""
    job = server.start(TRAIN, arguments(run_inputs, folder, *overrides))
    assert job.wait(timeout_s=200) == [0, 0], job.output()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def test_it_is_logged_and_part_of_the_total(server, run_inputs, tmp_path):
    lines = _trained(server, run_inputs, tmp_path / "run", *WITH_TERM)
    terms = ("mlm", "kl", "hidden", "attention", "embedding", "similarity")
    for line in lines:
        names = {name for name in line if name.startswith("loss/") and name.count("/") == 1}
        assert names == {f"loss/{name}" for name in (*terms, "total")}
        assert {f"loss/similarity/layer.{i}" for i in range(3)} <= set(line) and "share/similarity" in line
        weighted = sum((0.5 if name == "similarity" else 1.0) * line[f"loss/{name}"] for name in terms)
        assert line["loss/total"] == pytest.approx(weighted, rel=1e-5)
    assert lines[0]["widths/hidden"] == 24 and lines[-1]["widths/hidden"] == 12
    assert abs(lines[0]["loss/similarity"]) < 1e-6 < lines[-1]["loss/similarity"]
    assert "similarity 0.5" in (tmp_path / "run" / "export" / "README.md").read_text()


def test_it_trains_a_student_all_alone(server, run_inputs, tmp_path):
    lines = _trained(server, run_inputs, tmp_path / "run", *ALONE)
    first, last = lines[0]["loss/similarity"], lines[-1]["loss/similarity"]
    assert lines[0]["loss/total"] == pytest.approx(first) and 0 < last < first / 2, (first, last)


def test_its_flops_and_bytes_are_counted():
    student = {"hidden": 12}
    of_layer = {"ffn": 20, "heads": 4, "qk_dim": 3, "vo_dim": 3}
    student |= {f"layer.{i}.{kind}": size for i in range(2) for kind, size in of_layer.items()}
    teacher = student | {"hidden": 24}
    without = LossConfig(plugins=[str(PLUGIN)])
    with_term = dataclasses.replace(without, extra={"similarity": 0.5})
    batch = {"seq_len": 16, "target_rows": 2.0, "vocab_size": 101}
    flops = [step_flops(student, teacher, loss, num_sequences=8, **batch) for loss in (without, with_term)]
    assert flops[1].losses - flops[0].losses == 2 * 8 * 16 * 16 * (3 * 12 + 24) * 2
    assert (flops[1].student, flops[1].teacher) == (flops[0].student, flops[0].teacher)
    sizes = batch | {"student_bytes": 2, "teacher_bytes": 2}
    saved = [sequence_bytes(student, teacher, loss, **sizes).losses for loss in (without, with_term)]
    assert saved[1] - saved[0] == 4 * 16 * (2 * 12 + 16) * 2


def test_a_plan_counts_it(server, run_inputs, tmp_path):
    plans = []
    for name, overrides in (("without", ()), ("with", WITH_TERM)):
        out = tmp_path / f"{name}.json"
        options = ["--device", "A100-80", "--json", str(out)]
        job = server.start(PLAN, [*options, *arguments(run_inputs, tmp_path / "run", *overrides)], num_ranks=1)
        assert job.wait(timeout_s=100) == [0], job.output()
        plans.append(json.loads(out.read_text()))
    for without, with_term in zip(*(plan["stretches"] for plan in plans), strict=True):
        dims = 3 * without["hidden_size"] + 24
        assert with_term["flops"] - without["flops"] == pytest.approx(2 * 8 * 16 * 16 * dims * 3)
        assert with_term["memory"]["activations"] > without["memory"]["activations"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["loss.extra={similarty: 1}", WITH_TERM[0]], "loss.extra: found 'similarty'.*did you mean 'similarity'"),
        (["loss.extra={similarity: 1}"], "loss.extra: found 'similarity'.*loss.plugins"),
        (["loss.extra={kl: 1}"], "loss.extra: found 'kl', which has a field of its own; set loss.kl"),
        (["loss.plugins=[no_such_module]"], r"loss.plugins: cannot import 'no_such_module' \(ModuleNotFoundError: .*"),
        (
            ["loss.extra={similarity: -1}", WITH_TERM[0]],
            r"loss.extra.similarity: found -1(.0)?, allowed \[0, 1000000\]",
        ),
        (["loss.extra=3"], "loss.extra: found '3', allowed: a mapping such as {my_term: 0.5}"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(server, run_inputs, tmp_path, overrides, line):
    job = server.start(TRAIN, arguments(run_inputs, tmp_path / "run", *overrides))
    codes = job.wait(timeout_s=100)
    told = [text for text in job.output().splitlines() if re.search(line, text)]
    assert 0 not in codes and told, job.output()
    assert not (tmp_path / "run").exists() and "Traceback" not in job.output()
