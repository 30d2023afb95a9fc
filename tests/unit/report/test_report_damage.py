"""The report of a folder whose files are missing or damaged, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.html_page import Page
from support.report_folder import log_run, write_run

from homodistil.errors import UserError
from homodistil.report import write_report
from homodistil.report.comparison import write_run_comparison
from homodistil.report.figures import compose


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return write_run(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "ds_config.json", "metrics.jsonl", "events.jsonl", "result.json"])
def test_a_missing_file_is_named(run_dir, name):
    (run_dir / name).unlink()
    page = Page(write_report(run_dir).read_text())
    assert [text for text in page.text if "is missing" in text][0].startswith(f"{name} is missing: written ")
    if name == "metrics.jsonl":
        assert "Not recorded in this run so far." in page.text
        assert "Step 40 of 60." in page.text  # the last event


DAMAGE = {
    "config.yaml": ["train: [", "[1]", "a: 1", "run: {name: [1]}\ntrain: 3", "x: &a [*a]", "\x00", "\udcff"],
    "ds_config.json": ["{", "[" * 5000],
    "metrics.jsonl": [
        '{"kind": "train", "step": 1e400}\n{"kind": "train", "step": 3, "loss/mlm": Infinity, "widths/hidden": "x"}\n',
        '{"kind": "train", "step": 5, "loss/total": ' + "9" * 400 + "}\n" + "[" * 100_000 + "\n",
        '{"kind": "evaluation", "step": true}\n{"kind": "evaluation", "step": 4, "\\ud800": 1, "mlm_loss": NaN}\n',
        '{"kind": "train", "step": ' + "9" * 5000 + "}\n",
        '{"kind": ["train"], "step": 3}\nnull\n3\n"step"\n',
    ],
    "events.jsonl": [
        '{"step": 3}\n{"step": 4, "widths_before": {}, "widths_after": {"hidden": 0}, "gap_before": {"kl": "x"}}\n',
        '{"step": 3, "widths_before": {"hidden": 0}, "widths_after": {"hidden": 0}, "hash": 3, "milliseconds": "x"}\n',
        '{"step": 3, "gap_before": {"kl": [1]}, "gap_after": {"kl": true}, "bytes_moved": {}, "hash": null}\n',
    ],
    "result.json": [
        "[{",
        "{}",
        "3",
        "[1, null, [2]]",
        '[{"name": null, "parameters": true, "milestone": "x", "weights_bytes": "y"}]',
        '[{"name": "teacher", "parameters": "1"}, {"name": ["x"], "parameters": 1e999, "heldout_mlm_loss": "z"}]',
        '[{"milestone": 0.5, "heldout_mlm_loss": 1}, {"milestone": 0.5, "rates": "own", "heldout_mlm_loss": 2}]',
        "[" + "9" * 5000 + "]",
    ],
    "plan.json": ["{", "[]", '{"stretches": 3}', '{"stretches": [{"first_step": 0, "num_steps": 99}], "basis": 1}'],
    "row.json": ["[", "3", '{"parameters": 1e400}'],
    "teacher.json": ["{", '{"corrected": [1]}'],
    "glue/glue.json": ["[", '{"tasks": {"rte": {"best": {"score": "x"}}}}'],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_gives_a_page_and_a_note(run_dir, tmp_path_factory, monkeypatch, name):
    """Alone and beside another run; what could not be read is said wherever something was lost."""
    other = tmp_path_factory.mktemp("other")
    log_run(other, range(10, 30, 10))
    monkeypatch.setattr("homodistil.report.page.draw", lambda panels, *_names: compose(panels) and "<svg></svg>")
    monkeypatch.setattr("homodistil.report.comparison.page.inline", lambda figure, *_names: "<svg></svg>")
    (run_dir / name).parent.mkdir(exist_ok=True)
    for content in DAMAGE[name]:
        (run_dir / name).write_text(content, encoding="utf-8", errors="surrogateescape")
        page = Page(write_report(run_dir).read_text())
        assert "Result" in page.text
        write_run_comparison([run_dir, other], other / "both.html")
    # The last one of each of these cannot be used at all.
    if name in ("result.json", "plan.json", "metrics.jsonl"):
        assert any(text.startswith(f"{name}: ") and "cannot be read" in text for text in page.text)


def test_pages_replace_pages_alone(run_dir, tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    (place / "notes.txt").write_text("mine")
    for out, figures, message in (
        (place, None, r"--out: .* is a folder"),
        (place / "notes.txt", None, r"--out: .*notes\.txt exists and is no HTML page"),
        (run_dir / "metrics.jsonl", None, r"--out: .*metrics\.jsonl exists and is no HTML page"),
        (place / "notes.txt" / "page.html", None, r"--out: .*notes\.txt is no folder"),
        (None, place / "notes.txt", r"--figures: .*notes\.txt is no folder"),
        (place / ("x" * 300), None, r"--out: .* cannot be used \(File name too long\)"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            write_report(run_dir, out, figures)
        assert "\n" not in str(caught.value)
    assert (place / "notes.txt").read_text() == "mine" and not (run_dir / "report.html").exists()
    page = write_report(run_dir, place / "new" / "page.html", place / "figures")
    assert write_report(run_dir, page) == page


def test_folders_that_are_no_run_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="found a file"):
        write_report(Path(__file__))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "result.json").write_text("[{")
    with pytest.raises(UserError, match=r"result\.json: cannot be read"):
        write_report(tmp_path)
