"""The family on the report page and in the terminal: every member and control, and who is better by how much."""

from support.html_page import Page

from homodistil.metrics.result_table import write_result
from homodistil.report import write_report
from homodistil.report.milestones import COLUMNS, family_section, family_text, sentences


def _row(name: str, hidden: int, loss: float, **more) -> dict:
    return {"name": name, "parameters": 1000 * hidden, "hidden_size": hidden, "heldout_mlm_loss": loss, **more}


SPEED = {"inference_latency_ms": 1.234, "inference_tokens_per_s": 56789.0}
ROWS = [
    _row("teacher", 128, 4.0, kl_to_teacher=0, **SPEED),
    _row("homodistil @ 0.75", 96, 4.1, milestone=0.75, step=100, weights_bytes=13_530_000, **SPEED),
    _row("homodistil", 42, 4.5, milestone=0.333, step=400, **SPEED),
    _row("one_shot", 42, 4.4, milestone=0.333, step=400, rates="own"),
    _row("one_shot @ 0.75", 96, 4.15, milestone=0.75, step=100, rates="own"),
    _row("one_shot @ 0.75, the run's rates", 96, None, milestone=0.75, step=100, rates="run"),
]


def test_sentences_say_better_or_worse_by_how_much():
    assert sentences(ROWS) == [
        "Milestone 0.75 (hidden size 96): 0.050 better than one_shot @ 0.75.",
        "Milestone 0.333 (hidden size 42): 0.100 WORSE than one_shot.",
    ]


def test_each_member_is_followed_by_its_controls():
    section = family_section(ROWS)
    assert [row[0] for row in section.rows] == [ROWS[i]["name"] for i in (0, 1, 4, 5, 2, 3)]
    names = list(COLUMNS)
    member, control = section.rows[1], section.rows[2]
    assert member[names.index("weights_bytes")] == "13.5" and member[names.index("difference")] == "-"
    assert member[names.index("inference_tokens_per_s")] == "56,789" and control[names.index("difference")] == "+0.050"
    assert section.rows[3][names.index("difference")] == "-"  # not measured


def test_the_page_and_the_terminal_show_it_and_other_runs_have_none(tmp_path):
    write_result(tmp_path, ROWS)
    page = Page(write_report(tmp_path).read_text())
    assert "Family" in page.text and sentences(ROWS)[1] in page.text and "one_shot @ 0.75" in page.text
    assert page.tags.count("svg") == 1
    text = family_text(ROWS)
    assert sentences(ROWS)[0] in text and len({len(line) for line in text.splitlines()[:7]}) == 1
    assert family_section([ROWS[0]]) is None and family_text([ROWS[0]]) == ""
