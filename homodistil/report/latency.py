"""The section of a report on inference: the run's models in every format, and quality over the time of a sentence."""

from __future__ import annotations

from typing import Any

from homodistil.metrics.result_table import cell
from homodistil.report.comparison.groups import COLUMNS, Model
from homodistil.report.comparison.scatter import qualities, scatter_of
from homodistil.report.figures import inline
from homodistil.report.latency_file import read_latency, timed_rows
from homodistil.report.page import TableSection
from homodistil.report.run import Run, number

_FORMS = {
    "checkpoint": ("model", "{}"),
    "format": ("format", "{}"),
    "parameters": ("parameters", "{:,.0f}"),
    "megabytes": ("MB", "{:,.1f}"),
    "cosine": ("cosine with torch", "{:.4f}"),
    "ms_per_sentence": ("ms per sentence", "{:,.2f}"),
    "sentences_per_s": ("sentences/s", "{:,.0f}"),
}
Row = dict[str, Any]


def latency_section(run: Run) -> TableSection | None:
    """The section on the speed of the run's models; None before `homodistil latency RUN_DIR` has measured it."""
    content = read_latency(run.folder, run.notes)
    rows = [_with_quality(row, run) for row in timed_rows(content)]
    if not rows:
        return None
    models = [_model(row) for row in rows]
    measured = qualities(models)
    columns = _FORMS | {name: COLUMNS[name] for name in measured}
    figure = scatter_of(models, [("ms_per_sentence", quality) for quality in measured[:2]])
    description = "Quality of the run's models over the time that a sentence takes, in every format."
    return TableSection(
        "Inference",
        [heading for heading, _ in columns.values()],
        [[cell(row.get(column), form) for column, (_, form) in columns.items()] for row in rows],
        _caption(content),
        svg=inline(figure, "latency", description) if figure else None,
    )


def _with_quality(row: Row, run: Run) -> Row:
    """A timed row with the measures of the model's row in the result table."""
    same = next((other for other in run.rows if other.get("name") == row.get("checkpoint")), {})
    size = number(row.get("bytes"))
    return same | row | {"megabytes": None if size is None else size / 1e6}


def _model(row: Row) -> Model:
    values = {name: [value] for name in COLUMNS if (value := number(row.get(name))) is not None}
    return Model(f"{row.get('checkpoint')}, {row.get('format')}", values, 1)


def _caption(content: Row) -> str:
    """Under which conditions was timed."""
    conditions = [f"{name} {content[name]}" for name in ("tokens", "threads", "rounds") if name in content]
    return (
        f"One sentence at a time, and batches of 32, on the CPU of the machine that measured it "
        f"({', '.join(conditions)}). Backbones without a language-modelling head. Quality is that of the fp32 model; "
        f"the cosine says how near another format is to it."
    )
