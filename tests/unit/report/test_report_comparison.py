"""The page of many runs: seeds put together, values on the page, runs in any state, figures as files, the launcher."""

from __future__ import annotations

import json
import random
import re
import runpy
import statistics
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from support.html_page import Page
from support.report_folder import log_run, widths
from test_report import LAUNCHER

from homodistil.config.schema import RunConfig
from homodistil.errors import UserError
from homodistil.metrics.recorder import Recorder
from homodistil.metrics.result_table import write_result
from homodistil.report import write_report
from homodistil.report.comparison import write_comparison, write_run_comparison
from homodistil.report.comparison.groups import cell, columns, models
from homodistil.report.comparison.runs import read_entries, run_curves
from homodistil.report.comparison.scatter import scatter
from homodistil.report.figures import look

TEACHER = {"name": "teacher", "parameters": 4416698, "hidden_size": 31, "heldout_mlm_loss": 2.25, "kl_to_teacher": 0.0}


def student(loss: float, speed: float = 2500.0) -> dict:
    row = {"name": "homodistil", "parameters": 1104174, "hidden_size": 23, "heldout_mlm_loss": loss}
    return row | {"masked_top1": 0.5, "kl_to_teacher": loss - 2, "tokens_per_s_first": 1.0, "tokens_per_s_last": speed}


def make_run(folder: Path, seed: int, loss: float, end_fraction: float = 0.3) -> Path:
    folder.mkdir()
    config = RunConfig()
    config.run.name, config.run.dir, config.train.seed = folder.name, str(folder), seed
    config.train.steps, config.pruning.end_fraction = 60, end_fraction
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    (folder / "ds_config.json").write_text("{}")
    log_run(folder, range(10, 70, 10))
    write_result(folder, [TEACHER, student(loss), student(loss + 1) | {"name": "one_shot"}])
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Three seeds of one setting, one of another."""
    folders = [make_run(tmp_path / f"early-seed{i}", i, loss) for i, loss in enumerate((2.5, 2.6, 2.9))]
    return [*folders, make_run(tmp_path / "late", 0, 3.25, end_fraction=0.9)]


def test_seeds_are_put_together(runs, tmp_path):
    page = Page(write_run_comparison(runs, tmp_path / "page.html").read_text())
    text = " ".join(" ".join(page.text).split())
    deviation = statistics.stdev((2.5, 2.6, 2.9))
    for expected in (
        "4 runs",
        "teacher 1 4,416,698 31 2.250 - 0.000 -",  # the same row of four runs
        f"early 3 1,104,174 23 2.667 \u00b1 {deviation:.3f} 0.5000 \u00b1 0.0000 0.667 \u00b1 {deviation:.3f} 2,500 ",
        f"early: one_shot 3 1,104,174 23 3.667 \u00b1 {deviation:.3f}",
        "late 1 1,104,174 23 3.250 0.5000 1.250 2,500",
        f"{runs[1]} homodistil 1,104,174 23 2.600 50.0% 0.600 1 2,500",  # all rows, as they are
    ):
        assert expected in text
    assert "missing" not in text
    assert page.tags.count("svg") == 1 + 5  # scatter; held-out, jumps, losses, widths, speed (no gap/ in these logs)
    assert page.text.count("early") >= 1 + 4 + 2  # table, scatter panels, curves
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and not {"script", "link", "img"} & set(page.tags)


def test_curves_share_a_style_within_a_setting_and_one_label(runs):
    panel = next(c for c in run_curves(read_entries(runs)) if c.title == "Training loss").panels[0]
    assert [(line.label, line.style) for line in panel.lines] == [("early", 0), ("", 0), ("", 0), ("late", 1)]
    assert all(line.points == [(s, 9 - s / 10) for s in range(10, 70, 10)] for line in panel.lines)


def test_settings_of_one_name_are_told_apart_by_their_folders(runs):
    for folder in runs:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["run"]["name"] = "quickstart"
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert [entry.label for entry in read_entries(runs)] == ["early"] * 3 + ["late"]


def test_styles_differ():
    assert len({str(look(i)) for i in range(36)}) == 36
    assert all(look(i)["linestyle"] != look(i + 1)["linestyle"] for i in range(35))


def test_rows_of_a_benchmark_with_lists_and_holes():
    found = models(
        [
            {"name": "a", "parameters": 10, "heldout_mlm_loss": [1.0, 2.0, float("nan")], "stsb": None, "note": "text"},
            {"name": "b", "parameters": 10, "heldout_mlm_loss": 4, "movie_accuracy": 0.75},
            {"name": "b", "parameters": 20, "heldout_mlm_loss": None},
        ]
    )
    assert [(m.name, m.num_seeds) for m in found] == [("a", 2), ("b", 1), ("b", 1)]
    shown = columns(found)
    assert list(shown) == ["parameters", "heldout_mlm_loss", "movie_accuracy"]
    assert [cell(m, "heldout_mlm_loss", "{:.3f}") for m in found] == ["1.500 \u00b1 0.707", "4.000", "-"]
    assert shown["movie_accuracy"][0] == "movie accuracy"
    assert scatter(models([{"name": "a"}])) is None


def test_points_of_the_scatter_stand_at_the_means():
    rows = [{"name": n, "parameters": p, "heldout_mlm_loss": [v, v + 1]} for n, p, v in (("a", 100, 2), ("b", 900, 1))]
    figure = scatter(models(rows))
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "held-out MLM loss over parameters"
    ]  # no speed: one panel
    points = [
        (line.get_xdata()[0], line.get_ydata()[0]) for line in figure.axes[0].get_lines() if line.get_marker() in "os"
    ]
    assert points == [(100, 2.5), (900, 1.5)]
    assert [text.get_text() for text in figure.axes[0].texts] == ["a", "b"]
    faster = scatter(models([row | {"tokens_per_s": row["parameters"]} for row in rows]))
    assert faster.axes[1].get_title(loc="left") == "held-out MLM loss over tokens/s"
    sizes = [line.get_markersize() for line in faster.axes[0].get_lines() if line.get_marker() in "os"]
    assert sizes[0] < sizes[1]


def test_the_quality_benchmarks_rows(tmp_path):
    about = {"config": {"seeds": [0, 1], "parameters": [2121210]}, "unit": "nats", "value": 4.1}
    rows = [
        {"variant": "homodistil", "x": "half", "metric": "mlm_loss", "values": [4.125, 4.375], **about},
        {"variant": "homodistil", "x": "half", "metric": "stsb", "values": [0.5, 0.75], **about},
        {"variant": "teacher", "x": "teacher", "metric": "mlm_loss", **about},
    ]
    file = tmp_path / "quality_main.json"
    file.write_text(json.dumps(rows))
    text = " ".join(Page(write_run_comparison([file], tmp_path / "page.html").read_text()).text)
    assert "quality_main" in text
    assert re.search(r"homodistil, half\s+2\s+2,121,210\s+4\.250 \u00b1 0\.177\s+0\.625 \u00b1 0\.1768", text)
    assert re.search(r"teacher\s+1\s+2,121,210\s+4\.100\s+-", text)
    file.write_text('{"rows": 3}')
    with pytest.raises(UserError, match=r"quality_main\.json: found no rows of experiments/quality"):
        write_run_comparison([file], tmp_path / "page.html")


def test_glue_scores_of_a_run(runs):
    (runs[3] / "glue").mkdir()
    tasks = {"stsb": {"best": {"score": 0.5}}, "movie": {"best": {"score": 0.75}}}
    (runs[3] / "glue" / "glue.json").write_text(json.dumps({"tasks": tasks}))
    rows = read_entries(runs)[3].rows
    assert [row.get("glue") for row in rows] == [None, 0.625, None]
    (runs[3] / "glue" / "glue.json").write_text('{"tasks": [1]}')
    assert read_entries(runs)[3].notes == ["glue/glue.json: holds no scores"]


def test_one_cached_teacher_is_one_seed_and_seeds_are_those_of_the_students(runs, tmp_path):
    """Runs time their teacher again, and a run may be repeated with the same seed."""
    for i, folder in enumerate(runs[:3]):
        (folder / "teacher.json").write_text(json.dumps({"corrected": "ab12"}))
        teacher = TEACHER | {"inference_latency_ms": 2.0 + i, "tokens_per_s_last": 100.0 * i}
        write_result(folder, [teacher, student(2.5 + i)])
    config = yaml.safe_load((runs[1] / "config.yaml").read_text())
    config["train"]["seed"] = 0  # the second run repeats the first
    (runs[1] / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [row for entry in read_entries(runs[:3]) for row in entry.rows]
    found = {model.name: model for model in models(rows)}
    assert found["teacher"].num_seeds == 1 and found["teacher"].mean("inference_latency_ms") == 3.0
    assert found["early"].num_seeds == 2
    assert found["early"].values["heldout_mlm_loss"] == [3.0, 4.5]  # the mean of both measurements of seed 0
    (runs[2] / "teacher.json").write_text(json.dumps({"corrected": "cd34"}))
    rows = [row for entry in read_entries(runs[:3]) for row in entry.rows]
    assert next(model for model in models(rows) if model.name == "teacher").num_seeds == 2


def test_members_of_a_family_have_their_own_names(runs):
    member = {"name": "homodistil @ 0.75", "milestone": 0.75, "step": 30}
    last = student(2.5) | {"milestone": 0.5, "step": 60}
    controls = [{"name": "one_shot", "rates": "own"}, {"name": "one_shot @ 0.75", "milestone": 0.75, "rates": "own"}]
    write_result(runs[3], [TEACHER, member, last, *controls])
    names = [row["name"] for row in read_entries(runs)[3].rows]
    assert names == ["teacher", "late @ 0.75", "late", "late: one_shot", "late: one_shot @ 0.75"]
    several = [last | {"student": name, "name": name} for name in ("small", "tiny")]
    write_result(runs[3], [TEACHER, *several])
    assert [row["name"] for row in read_entries(runs)[3].rows] == ["teacher", "late: small", "late: tiny"]


def test_a_table_of_many_columns_stands_upright(tmp_path):
    rows = [{"name": name, "parameters": 1, **{f"column_{i}": i for i in range(16)}} for name in ("a", "b")]
    page = Page(write_comparison(rows, [], tmp_path / "page.html").read_text())
    assert page.tags.count("tr") == 1 + 18 and page.tags.count("th") == 3
    many = [{**rows[0], "name": str(i)} for i in range(30)]
    page = Page(write_comparison(many, [], tmp_path / "page.html").read_text())
    assert page.tags.count("tr") == 1 + 30 and ("div", "class", "wide") in page.attributes  # scrolls


def test_held_out_curves_have_teachers_and_controls(runs):
    for folder in runs:
        log_run(folder / "compare" / "one_shot", range(10, 70, 10))
    panel = next(c for c in run_curves(read_entries(runs)) if c.title == "Held-out values").panels[0]
    labels = [line.label for line in panel.lines]
    assert labels == ["early", "", "", "late", "early: one_shot", "late: one_shot", "teacher"]
    assert panel.lines[-1].points == [(30, 2.25), (60, 2.25)]


# --- runs in any state ------------------------------------------------------------------------------------------------


def test_half_finished_and_damaged_runs_are_shown_with_a_note(runs, tmp_path):
    (runs[0] / "result.json").unlink()
    (runs[0] / "row.json").write_text(json.dumps(student(2.5)))
    (runs[1] / "result.json").write_text('[{"name": "hom')
    with open(runs[2] / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\xfe garbage\n{"kind": "train"}\n[1]\n{"kind": "train", "step": "x"}\n{"kind": "train", "st')
    (runs[3] / "config.yaml").write_text("train: [")
    page = Page(write_run_comparison(runs, tmp_path / "page.html").read_text())
    text = " ".join(page.text)
    assert f"{runs[0]}: result.json missing." in text
    assert f"{runs[1]}: result.json: cannot be read (" in text
    assert f"{runs[2]}: metrics.jsonl: 4 of 13 lines cannot be read." in text  # the torn last line is no damage
    assert f"{runs[3]}: config.yaml: cannot be read (" in text
    assert re.search(r"early\s+2\s+1,104,174", text)  # row.json and the third seed


def test_a_run_that_goes_on(tmp_path):
    folder = make_run(tmp_path / "going", 0, 2.5)
    (folder / "result.json").unlink()
    with Recorder(folder, total_steps=60, start_step=30, enabled=True):
        pass
    text = " ".join(Page(write_run_comparison([folder], tmp_path / "page.html").read_text()).text)
    assert f"{folder}: result.json missing; stands at step 30 of 60." in text and "No results yet." in text


def test_no_damage_gives_a_traceback(tmp_path):
    """Bytes of a real run's files are changed or cut at random places."""
    folder = make_run(tmp_path / "run", 0, 2.5)
    names = ["config.yaml", "ds_config.json", "metrics.jsonl", "events.jsonl", "result.json"]
    whole = {name: (folder / name).read_bytes() for name in names}
    draw = random.Random(0)
    changed = 0
    for _ in range(80):
        for name, content in whole.items():
            damaged = bytearray(content)
            for _ in range(draw.choice([0, 1, 5])):
                damaged[draw.randrange(len(damaged))] = draw.choice(b'\xff\x00"{}[]:,3x \n')
            cut = draw.choice([len(damaged), draw.randrange(len(damaged))])
            (folder / name).write_bytes(damaged[:cut])
        try:
            entries = read_entries([folder])
        except UserError:  # a folder of which nothing at all can be read
            changed += 1
            continue
        models(entries[0].rows)
        run_curves(entries)
        changed += bool(entries[0].notes)
    assert changed > 50
    write_run_comparison([folder], tmp_path / "page.html")


def test_values_of_another_kind_are_left_out(tmp_path):
    folder = make_run(tmp_path / "run", 0, 2.5)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 70, "loss/total": "x", "loss/mlm": [1], "widths/hidden": {}}\n')
    with open(folder / "events.jsonl", "a") as file:
        event = {"step": 50, "gap_before": 3, "widths_after": [], "widths_before": widths(3, (4, 4), 1)}
        file.write(json.dumps(event | {"gap_after": {"kl": "x"}, "milliseconds": "x"}) + "\n")
    write_result(folder, [student(2.5) | {"parameters": "many", "heldout_mlm_loss": [2.5]}])
    text = " ".join(Page(write_run_comparison([folder], tmp_path / "page.html").read_text()).text)
    assert "many" in text  # as it stands, in the list of all rows
    points = next(c for c in run_curves(read_entries([folder])) if c.title == "Training loss").panels[0].lines[0].points
    assert points[-1] == (60, 3.0)


def test_folders_that_are_no_run_are_refused_before_anything_is_written(runs, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for bad, message in ((empty, "not a run folder"), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(UserError, match=message):
            write_run_comparison([runs[0], bad], tmp_path / "out" / "page.html", tmp_path / "figures")
    assert not (tmp_path / "out").exists() and not (tmp_path / "figures").exists()
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        write_comparison([TEACHER], [], tmp_path / "out" / "page.html")


# --- files ------------------------------------------------------------------------------------------------------------


def test_every_figure_is_exported(runs, tmp_path):
    folder = tmp_path / "figures"
    page = Page(write_run_comparison(runs[2:], tmp_path / "page.html", folder).read_text())
    names = sorted(path.name for path in folder.iterdir())
    stems = ["held-out-values", "jump-at-a-resize", "size-quality-speed", "speed", "training-loss", "widths"]
    assert names == sorted(f"{stem}.{end}" for stem in stems for end in ("png", "svg"))
    assert len(stems) == page.tags.count("svg")
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            # Not blank, and still so in black and white.
            assert image.width == 1800 and image.convert("L").getextrema()[0] < 100
    assert "early" in (folder / "held-out-values.svg").read_text()  # text stays text


def test_one_run_elsewhere_with_its_figures(runs, tmp_path):
    path = write_report(runs[0], tmp_path / "new" / "one.html", tmp_path / "figures")
    assert path == tmp_path / "new" / "one.html" and not (runs[0] / "report.html").exists()
    assert Page(path.read_text()).tags.count("svg") == len(list((tmp_path / "figures").glob("*.svg"))) == 7


def test_launcher_compares_many(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, runs[:2]), "--out", str(tmp_path / "both.html")])
    runpy.run_path(str(LAUNCHER), run_name="__main__")
    assert capsys.readouterr().out == f"{tmp_path / 'both.html'}\n"
    assert "2 runs" in Page((tmp_path / "both.html").read_text()).text
