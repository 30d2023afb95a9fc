"""The HTML of a comparison. Everything that comes from files is escaped (jinja2 autoescape)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from homodistil.metrics.result_table import cells, columns_of
from homodistil.report.comparison.groups import Model, cell, columns
from homodistil.report.curves import Curve
from homodistil.report.figures import inline
from homodistil.report.page import CSS, drawn

SCATTER_CAPTION = (
    "One shape and label per model; bars are standard deviations over seeds. Over size, larger markers are faster."
)

_MOST_COLUMNS = 10  # more do not fit on a screen
_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} - homodistil</title>
<style>
{{ css }}
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% macro table(headings, rows) %}
<div class="wide"><table class="names">
<thead><tr>{% for heading in headings %}<th>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endmacro %}
{% for note in notes %}
<p class="quiet">{{ note }}</p>
{% endfor %}

<h2>Models</h2>
{% if models %}
<p class="quiet">Mean, and standard deviation over the seeds.</p>
{{ table(model_headings, models) }}
{% else %}
<p class="quiet">No results yet.</p>
{% endif %}
{% if scatter %}

<h2>Size, quality, speed</h2>
<figure><figcaption>{{ scatter_caption }}</figcaption>{{ scatter }}</figure>
{% endif %}
{% for curve in curves if curve.svg %}

<h2>{{ curve.title }}</h2>
<figure><figcaption>{{ curve.caption }}</figcaption>{{ curve.svg }}</figure>
{% endfor %}
{% if sources %}

<h2>All rows</h2>
{{ table(row_headings, sources) }}
{% endif %}
</body>
</html>
"""


def render(
    title: str,
    models: Sequence[Model],
    scatter: Figure | None,
    curves: Sequence[Curve],
    notes: Sequence[str],
    sources: Sequence[tuple[str, Mapping[str, Any]]],
) -> str:
    """The HTML text of the page.

    Args:
        scatter: figure of size, quality and speed; None: the page has none.
        notes: one sentence per input of which something is missing.
        sources: (file or folder, row of its result table), listed unchanged at the end of the page.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    headings, lines = _table(models)
    row_columns = columns_of([row for _, row in sources])
    return environment.from_string(_TEMPLATE).render(
        title=title,
        css=Markup(CSS),
        notes=notes,
        model_headings=headings,
        models=lines,
        scatter=scatter and Markup(inline(scatter, "scatter", f"Size, quality, speed. {SCATTER_CAPTION}")),
        scatter_caption=SCATTER_CAPTION,
        curves=drawn(curves),
        row_headings=["from", *(heading for heading, _ in row_columns.values())],
        sources=[[source, *cells(row, row_columns)] for source, row in sources],
    )


def _table(models: Sequence[Model]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of a table with one line per model.

    If there are too many columns for the screen and fewer models, the table is transposed: one column per model.
    """
    shown = columns(models)
    headings = ["model", "seeds", *(heading for heading, _ in shown.values())]
    lines = [[m.name, str(m.num_seeds), *(cell(m, c, form) for c, (_, form) in shown.items())] for m in models]
    if len(headings) <= _MOST_COLUMNS or len(models) + 1 >= len(headings):
        return headings, lines
    first, *rest = zip(headings, *lines, strict=True)
    return list(first), [list(line) for line in rest]
