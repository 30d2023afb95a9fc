"""What `homodistil latency RUN_DIR` measured, on the page of the run and on a comparison."""

import json

import pytest
from support.html_page import Page
from test_report_comparison import make_run

from homodistil.report import write_report
from homodistil.report.comparison import write_run_comparison
from homodistil.report.comparison.groups import models
from homodistil.report.comparison.runs import read_entries
from homodistil.report.comparison.scatter import scatter
from homodistil.report.latency import latency_section
from homodistil.report.run import read_run


def _timed(name: str, kind: str, ms: float) -> dict:
    size = {"output": "last_hidden_state", "parameters": 1000, "bytes": 4_000_000, "cosine": 0.98765}
    return {"checkpoint": name, "format": kind, **size, "ms_per_sentence": ms, "sentences_per_s": 2000 / ms}


ROWS = [_timed("teacher", "torch", 4.0), _timed("homodistil", "torch", 1.5), _timed("homodistil", "onnx-int8", 0.25)]


@pytest.fixture
def run_dir(tmp_path):
    folder = make_run(tmp_path / "run", 0, 2.5)
    content = {"tokens": 32, "threads": 1, "rounds": 15, "rows": ROWS}
    (folder / "latency.json").write_text(json.dumps(content))
    return folder


def test_every_format_has_the_quality_of_its_model(run_dir):
    section = latency_section(read_run(run_dir))
    assert section.headings[:2] == ["model", "format"] and "held-out MLM loss" in section.headings
    shown = [dict(zip(section.headings, row, strict=True)) for row in section.rows]
    assert [row["ms per sentence"] for row in shown] == ["4.00", "1.50", "0.25"]
    assert [row["held-out MLM loss"] for row in shown] == ["2.250", "2.500", "2.500"]
    assert shown[2]["sentences/s"] == "8,000" and shown[2]["MB"] == "4.0" and shown[2]["cosine with torch"] == "0.9877"
    assert "tokens 32, threads 1, rounds 15" in section.caption
    for text in ("homodistil, onnx-int8", "held-out MLM loss over ms per sentence"):
        assert text in section.svg


def test_the_page_shows_it_where_it_was_measured(run_dir):
    with_times = Page(write_report(run_dir).read_text())
    (run_dir / "latency.json").unlink()
    without = Page(write_report(run_dir).read_text())
    assert "Inference" in with_times.text and "Inference" not in without.text
    assert with_times.tags.count("svg") == without.tags.count("svg") + 1


def test_a_comparison_has_times_of_torch_and_plots_them_instead_of_training_speed(run_dir):
    rows = {row["name"]: row for entry in read_entries([run_dir]) for row in entry.rows}
    assert rows["run"]["ms_per_sentence"] == 1.5 and rows["teacher"]["ms_per_sentence"] == 4.0
    assert "ms_per_sentence" not in rows["run: one_shot"]
    figure = scatter(models(list(rows.values())))
    assert figure.axes[-1].get_xlabel() == "ms per sentence"
    assert "1.50" in Page(write_run_comparison([run_dir], run_dir.parent / "page.html").read_text()).text


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": 3}', "[" * 3000])
def test_a_damaged_file_is_a_note(run_dir, text):
    (run_dir / "latency.json").write_text(text)
    run = read_run(run_dir)
    (entry,) = read_entries([run_dir])
    assert latency_section(run) is None
    for notes in (run.notes, entry.notes):
        assert [note for note in notes if note.startswith("latency.json: cannot be read")]


def test_rows_without_a_time_are_left_out(run_dir):
    rows = [3, {"checkpoint": "teacher"}, _timed("x", "torch", float("inf")), _timed("homodistil", "torch", 2.0)]
    (run_dir / "latency.json").write_text(json.dumps({"rows": rows}))
    assert [row[:2] for row in latency_section(read_run(run_dir)).rows] == [["homodistil", "torch"]]
