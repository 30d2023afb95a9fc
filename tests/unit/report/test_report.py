"""The report page: real values on it, everything escaped, runs in any state, and the launcher's exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from support.html_page import Page
from support.report_folder import EVENTS, ROWS, log_run, write_configs, write_run

from homodistil.metrics.recorder import Recorder
from homodistil.metrics.result_table import write_result
from homodistil.report import write_report
from homodistil.report.curves import curves, width_history
from homodistil.report.run import read_run

LAUNCHER = Path(__file__).parents[3] / "launcher" / "report.py"


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return write_run(tmp_path)


def test_page_shows_the_values_of_the_run(run_dir):
    before = sorted(p.name for p in run_dir.iterdir())
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    assert sorted(p.name for p in run_dir.iterdir()) == sorted([*before, "report.html"])

    page = Page(path.read_text())
    text = " ".join(" ".join(page.text).split())
    for expected in (
        "quick Step 60 of 60.",
        "teacher 4,416,698 31 2.346 54.3% - - -",
        "student 1,104,174 23 2.500 - 0.322 1,000 2,500",
        "student: 1,104,174 of the teacher's 4,416,698 parameters (25.0%, 4.00x smaller); held-out MLM loss 2.500 "
        "against the teacher's 2.346 (+0.154).",
        "20 31 \u2192 29 40 \u2192 32-36 3 9 0.5123 0.7654 7.5 2.0 KiB 01234567",
        "40 29 \u2192 23 32-36 3 9 \u2192 7 - - 8.0 3.0 MiB fedcba98",
        "hidden 31 to 23",  # label at the end of a curve
        "heldout_fraction: 0.05",
    ):
        assert expected in text
    assert page.tags.count("svg") == 7 and page.tags.count("details") == 3
    assert "mlm loss" in text and "masked rows" not in text  # a constant count is no curve
    assert "missing" not in text and "Not recorded" not in text


def test_page_needs_nothing_from_outside(run_dir):
    html = write_report(run_dir).read_text()
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "image"} & set(page.tags)
    targets = [value for _, name, value in page.attributes if name in ("href", "xlink:href", "src")]
    assert targets and all(value.startswith("#") for value in targets)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html)) and "@import" not in html
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and {value[1:] for value in targets} <= set(ids)


def test_curves_pass_through_the_logged_values(run_dir):
    """The drawn loss falls in a straight line, as the logged one does."""
    html = write_report(run_dir).read_text()
    figure = html[html.index("<h2>Losses") : html.index("<h2>Terms by layer")]
    paths = [re.findall(r"[ML] ([\d.]+) ([\d.]+)", path) for path in re.findall(r'<path d="([^"]*)"', figure)]
    total = next(path for path in paths if len(path) == 6)  # six logged steps
    x, y = ([float(point[axis]) for point in total] for axis in (0, 1))
    rights, downs = ([b - a for a, b in zip(v, v[1:], strict=False)] for v in (x, y))
    assert min(rights) > 0 and min(downs) > 0  # SVG's y grows downwards
    assert max(downs) - min(downs) < 1e-3 and max(rights) - min(rights) < 1e-3  # six decimals in the file


def test_gap_is_a_saw_tooth_through_both_values_of_every_event(run_dir):
    html = write_report(run_dir).read_text()
    figure = html[html.index("<h2>Jump at a resize") : html.index("<h2>Held-out")]
    paths = [re.findall(r"[ML] ([\d.]+) ([\d.]+)", path) for path in re.findall(r'<path d="([^"]*)"', figure)]
    # Four corners: the line of two events starts upwards, the frames around it start sideways.
    line = next(path for path in paths if len(path) == 4 and path[0][0] == path[1][0])
    (x0, before), (x1, after), (x2, next_before), (x3, next_after) = [(float(x), float(y)) for x, y in line]
    assert x0 == x1 < x2 == x3
    # Logged 0.1 -> 0.2, then 0.05 -> 0.15; SVG's y grows downwards, six decimals in the file.
    jump = before - after
    assert jump > 0
    assert next_before - next_after == pytest.approx(jump, abs=1e-3)
    assert next_before - before == pytest.approx(jump / 2, abs=1e-3)
    assert "kl, probe batch" in figure and "hidden, probe batch" in figure and "attention" not in figure


def test_everything_from_the_folder_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>&amp;\'$\\frac$'
    write_configs(tmp_path, name=evil)
    write_result(tmp_path, [{**ROWS[0], "name": evil}])
    with Recorder(tmp_path, total_steps=60, start_step=0, enabled=True) as recorder:
        recorder.log_event({**EVENTS[0], "hash": "<b>12345"})
        recorder.log_evaluation(10, {evil: 1.0, "mlm_loss": 2.0})
    page = Page(write_report(tmp_path).read_text())
    assert "script" not in page.tags and "b" not in page.tags
    assert page.text.count(evil) >= 3  # heading, result table, panel title: whole and as text
    assert any(evil in text for text in page.text if "heldout_fraction" in text)  # config.yaml
    assert "<b>12345" in page.text


def test_a_run_that_has_only_started(tmp_path):
    write_configs(tmp_path)
    page = Page(write_report(tmp_path).read_text())
    assert {"No step logged yet.", "No results yet.", "No resize so far."} <= set(page.text)
    assert "svg" not in page.tags


def test_a_run_being_written_and_non_finite_values(run_dir):
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 70, "loss/total": null, "loss/mlm": null, "optim/grad_norm": null}\n')
        file.write('{"kind": "train", "step": 80, "loss/to')
    page = Page(write_report(run_dir).read_text())
    assert "Step 70 of 60." in page.text and page.tags.count("svg") == 7


def test_resumed_run_gives_the_same_page(run_dir, tmp_path_factory):
    resumed = tmp_path_factory.mktemp("resumed")
    log_run(resumed, range(10, 50, 10))
    log_run(resumed, range(30, 70, 10), start_step=20)
    write_configs(resumed)
    write_result(resumed, ROWS)
    assert write_report(resumed).read_bytes() == write_report(run_dir).read_bytes()


def test_a_step_evaluated_twice_counts_once(run_dir):
    with Recorder(run_dir, total_steps=60, start_step=60, enabled=True) as recorder:
        recorder.log_evaluation(60, {"mlm_loss": 1.5})
    assert read_run(run_dir).evaluation_points("mlm_loss") == [(30, 2.5), (60, 1.5)]


def test_widths_come_from_events_and_otherwise_from_the_log(run_dir, tmp_path_factory):
    history = [(step, w["hidden"]) for step, w in width_history(read_run(run_dir))]
    assert history == [(0, 31), (20, 29), (40, 23), (60, 23)]
    plain = tmp_path_factory.mktemp("plain")
    with Recorder(plain, total_steps=60, start_step=0, enabled=True) as recorder:
        recorder.log_step(10, {"loss/total": 1.0, "widths/hidden": 31, "widths/layer.0.ffn": 17})
    assert width_history(read_run(plain)) == [(10, {"hidden": 31, "layer.0.ffn": 17})]


def test_layers_that_leave_have_a_column_of_events(run_dir):
    assert "<th>layers</th>" not in write_report(run_dir).read_text()
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    first, *_ = lines
    fewer = {axis: width for axis, width in first["widths_after"].items() if not axis.startswith("layer.1.")}
    lines.insert(1, first | {"widths_before": first["widths_after"], "widths_after": fewer, "layers_after": [0]})
    (run_dir / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = write_report(run_dir).read_text()
    assert "<th>step</th><th>layers</th><th>hidden</th>" in html and "<td>2 \N{RIGHTWARDS ARROW} 1</td>" in html


def test_held_out_curves_have_the_teacher_and_the_controls(run_dir):
    log_run(run_dir / "compare" / "one_shot", range(10, 70, 10))
    log_run(run_dir / "compare" / "one_shot-0.75", range(10, 70, 10))
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["run"]["compare"] = ["one_shot"]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    panel = next(c for c in curves(read_run(run_dir)) if c.title == "Held-out values").panels[0]
    assert [(line.label, line.points) for line in panel.lines] == [
        ("quick", [(30, 2.5), (60, 2.0)]),
        ("one_shot", [(30, 2.5), (60, 2.0)]),
        ("teacher", [(30, 2.3456), (60, 2.3456)]),
    ]
    html = write_report(run_dir).read_text()
    figure = html[html.index("<h2>Held-out") : html.index("<h2>Speed")]
    assert ">teacher<" in figure and ">one_shot<" in figure


@pytest.mark.process
def test_launcher(server, run_dir):
    assert server.run(LAUNCHER, [str(run_dir)], num_ranks=1, timeout_s=60) == f"{run_dir / 'report.html'}\n"
    Page((run_dir / "report.html").read_text())


@pytest.mark.process
def test_launcher_refuses_in_one_line(server, tmp_path):
    job = server.start(LAUNCHER, [str(tmp_path / "no")], num_ranks=1)
    assert job.wait(timeout_s=60) == [2], job.output()
    (line,) = job.output().splitlines()
    assert line.startswith("error: run folder")
