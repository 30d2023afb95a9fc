"""The HTML of a report. Everything that comes from the run folder is escaped (jinja2 autoescape)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from homodistil.metrics.result_table import DASH, cells, columns_of, is_teacher
from homodistil.report.curves import FAMILIES, ONLY_WHERE_NAMED, Curve, curves, gap
from homodistil.report.figures import draw
from homodistil.report.run import FILES, Run, number
from homodistil.report.speed import memory_sentences, speed_sentences

CSS = """body { margin: 2.5rem auto 4rem; max-width: 82rem; padding: 0 1.5rem; color: #1a1a1a; background: #fff;
       font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; font-weight: 600; margin: 0; }
h2 { font-size: 1.1rem; font-weight: 600; margin: 2.6rem 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; }
.quiet, figcaption { color: #666; }
figure { margin: 0; }
figure > svg { max-width: 62rem; }
.note { color: #8a3b00; }
figcaption { font-size: .87rem; margin-bottom: .6rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
.wide { overflow-x: auto; margin-top: .9rem; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { font-weight: 600; border-bottom: 1px solid #1a1a1a; vertical-align: bottom;
     white-space: normal; max-width: 8.5em; }
th, td { text-align: right; padding: .25rem 0 .25rem 1.4rem; }
th:first-child, td:first-child { padding-left: 0; }
.names th:first-child, .names td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
td { border-bottom: 1px solid #e8e8e8; }
details { margin-top: .6rem; }
summary { cursor: pointer; }
pre { font: .8rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; background: #f7f7f7; padding: .8rem 1rem;
      overflow-x: auto; }
@media print { body { margin: 0; max-width: none; } figure, tr { break-inside: avoid; } }"""
"""Style sheet of the page of one run and of the comparison."""

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ run.name }} - homodistil</title>
<style>
{{ css }}
</style>
</head>
<body>
<h1>{{ run.name }}</h1>
<p class="quiet">{{ progress }}</p>
{% for name in run.missing %}
<p class="quiet">{{ name }} is missing: {{ files[name] }}.</p>
{% endfor %}
{% for note in run.notes %}
<p class="note">{{ note }}.</p>
{% endfor %}

<h2>Result</h2>
{% for sentence in sentences %}
<p>{{ sentence }}</p>
{% endfor %}
{% if rows %}
<div class="wide"><table class="names">
<thead><tr>{% for heading in headings %}<th>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% else %}
<p class="quiet">No results yet.</p>
{% endif %}
{% for section in sections %}

<h2>{{ section.title }}</h2>
{% for sentence in section.sentences %}
<p>{{ sentence }}</p>
{% endfor %}
<figure><figcaption>{{ section.caption }}</figcaption>
<div class="wide"><table{% if section.has_names %} class="names"{% endif %}>
<thead><tr>{% for heading in section.headings %}<th>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in section.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% if section.svg %}
{{ section.svg | safe }}
{% endif %}
</figure>
{% endfor %}
{% for curve in curves %}

<h2>{{ curve.title }}</h2>
{% if curve.svg %}
<figure><figcaption>{{ curve.caption }}</figcaption>{{ curve.svg }}</figure>
{% else %}
<p class="quiet">Not recorded in this run so far.</p>
{% endif %}
{% endfor %}

<h2>Resizes</h2>
{% if events %}
<details{% if events | length <= 30 %} open{% endif %}>
<summary>{{ events | length }} resize{{ "" if events | length == 1 else "s" }}</summary>
<div class="wide"><table>
<thead><tr>{% for heading in event_headings %}<th>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for event in events %}
<tr>{% for cell in event %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
</details>
{% else %}
<p class="quiet">No resize so far.</p>
{% endif %}

<h2>Configuration</h2>
{% for name in ("config.yaml", "ds_config.json") if name in run.texts %}
<details><summary>{{ name }}</summary>
<pre>{{ run.texts[name] }}</pre>
</details>
{% else %}
<p class="quiet">No configuration in this folder.</p>
{% endfor %}
</body>
</html>
"""


class TableSection(NamedTuple):
    """A section of the page that not every run has: a table, with sentences before it and a figure behind it."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    caption: str
    sentences: Sequence[str] = ()
    svg: str | None = None
    has_names: bool = True
    """Whether the first column holds names, which stay in sight when the table is scrolled."""


def render(run: Run, sections: Sequence[TableSection] = ()) -> str:
    """The HTML text of the page of `run`, with these sections behind its results."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    return environment.from_string(_TEMPLATE).render(
        run=run,
        sections=sections,
        files=FILES,
        progress=_progress(run),
        sentences=[*summary(run.rows), *speed_sentences(run), *memory_sentences(run)],
        headings=[heading for heading, _ in columns_of(run.rows).values()],
        rows=[cells(row, columns_of(run.rows)) for row in run.rows],
        css=Markup(CSS),
        curves=drawn(curves(run)),
        event_headings=[
            "step",
            *(["layers"] if _layers_leave(run) else []),
            *(FAMILIES[kind] for kind in _kinds(run)),
            *(f"{_distance_name(run)} {when}" for when in ("before", "after")),
            "ms",
            "moved",
            "hash",
        ],
        events=[_event_cells(event, _kinds(run), _layers_leave(run)) for event in run.events],
    )


def drawn(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """ "title", "caption" and "svg" of every figure of a page; svg is None if there is nothing to draw."""
    figures = []
    for i, curve in enumerate(curves):
        svg = Markup(draw(curve.panels, f"figure{i + 1}", f"{curve.title}. {curve.caption}")) if curve.panels else None
        figures.append({"title": curve.title, "caption": curve.caption, "svg": svg})
    return figures


def _progress(run: Run) -> str:
    if not run.last_step:
        return "No step logged yet."
    of_total = f" of {run.total_steps:,}" if run.total_steps else ""
    return f"Step {run.last_step:,}{of_total}."


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Compression and quality in words: one sentence per model except the teacher.

    The teacher is the row whose name starts with "teacher". Without it there is nothing to compare with, and the list
    is empty.
    """
    teacher = next((row for row in rows if is_teacher(row)), None)
    return [text for row in rows if row is not teacher and (text := _sentence(row, teacher or {}))]


def _sentence(row: dict[str, Any], teacher: dict[str, Any]) -> str:
    parts = []
    size, full = number(row.get("parameters")), number(teacher.get("parameters"))
    if size and full:
        parts.append(f"{size:,} of the teacher's {full:,} parameters ({size / full:.1%}, {full / size:.2f}x smaller)")
    for column, what in (("heldout_mlm_loss", "held-out MLM loss"), ("heldout_lm_loss", "held-out loss")):
        loss, reference = number(row.get(column)), number(teacher.get(column))
        if loss is not None and reference is not None:
            parts.append(f"{what} {loss:.3f} against the teacher's {reference:.3f} ({loss - reference:+.3f})")
    return f"{row.get('name', 'model')}: {'; '.join(parts)}." if parts else ""


def _kinds(run: Run) -> list[str]:
    """Kinds of axes with a column in the table of events: of grouped heads and heads of labels where there are such."""
    named = {axis.rsplit(".", 1)[-1] for event in run.events for axis in event.get("widths_before") or {}}
    return [kind for kind in FAMILIES if kind not in ONLY_WHERE_NAMED or kind in named]


def _distance_name(run: Run) -> str:
    has_words = not run.events or any(gap(event, "gap_before", "kl") is not None for event in run.events)
    return "KL" if has_words else "loss"


def _distance(event: dict[str, Any], side: str) -> float | None:
    """The KL; of models without a head the weighted sum of all terms."""
    kl = gap(event, side, "kl")
    return gap(event, side, "total") if kl is None else kl


def _layers_leave(run: Run) -> bool:
    sides = ([event.get(f"widths_{side}") or {} for side in ("before", "after")] for event in run.events)
    return any(_num_layers(before) != _num_layers(after) for before, after in sides)


def _event_cells(event: dict[str, Any], kinds: Sequence[str], with_layers: bool = False) -> list[str]:
    before, after = event.get("widths_before") or {}, event.get("widths_after") or {}
    return [
        f"{event['step']:,}",
        *([_changed(*(str(_num_layers(widths)) for widths in (before, after)))] if with_layers else []),
        *(_change(before, after, kind) for kind in kinds),
        _number(_distance(event, "gap_before"), "{:.4f}"),
        _number(_distance(event, "gap_after"), "{:.4f}"),
        _number(event.get("milliseconds"), "{:,.1f}"),
        _bytes(event.get("bytes_moved")),
        str(event.get("hash") or DASH)[:8],
    ]


def _change(before: dict[str, int], after: dict[str, int], family: str) -> str:
    """ "128 -> 120", or one number if nothing changes; a range such as "96-128" if the layers differ."""
    return _changed(_range(before, family), _range(after, family))


def _changed(old: str, new: str) -> str:
    return new if old == new else f"{old} \N{RIGHTWARDS ARROW} {new}"


def _num_layers(widths: dict[str, int]) -> int:
    return sum(axis.endswith(".ffn") for axis in widths)


def _range(widths: dict[str, int], family: str) -> str:
    of_kind = [v for axis, v in widths.items() if axis.rsplit(".", 1)[-1] == family and v is not None]
    if not of_kind:
        return DASH
    low, high = min(of_kind), max(of_kind)
    return f"{low}" if low == high else f"{low}-{high}"


def _number(value: float | None, form: str) -> str:
    return DASH if value is None else form.format(value)


def _bytes(value: float | None) -> str:
    if value is None:
        return DASH
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
