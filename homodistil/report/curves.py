"""The curves of a run's page, and the logged values that each of them shows. Drawn by report/figures.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from homodistil.metrics.result_table import HELDOUT_COLUMNS
from homodistil.metrics.term_labels import term_label
from homodistil.report.figures import MAX_POINTS, Line, Panel
from homodistil.report.run import Points, Run, number

_PAPERS_TERMS = ("mlm", "kl", "hidden", "attention", "embedding")
TEACHER_STYLE = 5
"""Number of the line style of the teacher (grey), the same in all figures."""
_LONGEST_LABEL = 24
_MOST_CONTROLS = 4  # beside which a line can still be followed
FAMILIES = {
    "hidden": "hidden",
    "ffn": "feed-forward",
    "heads": "heads",
    "kv_heads": "kv heads",
    "heads_in_group": "heads per kv head",
    "qk_dim": "head dim",
    "classifier": "head of labels",
}
"""Kind of axis -> its heading; a model has `heads`, or the two kinds of grouped ones."""
ONLY_WHERE_NAMED = ("kv_heads", "heads_in_group", "classifier")
"""Of these kinds: those that few models have."""


@dataclass(frozen=True)
class Curve:
    title: str
    caption: str
    panels: list[Panel]
    """Empty if the run has not logged the values that this figure needs."""


def curves(run: Run) -> list[Curve]:
    """All figures of the page of `run`, in the order of the page."""
    builders: dict[str, tuple[str, Callable[[Run], list[Panel]]]] = {
        "Losses": ("Training loss: the weighted sum, and every term before its weight.", _losses),
        "Terms by layer": ("Distillation terms by layer; the number at the end of a line is the layer.", _layer_terms),
        "Widths": ("Share of the starting width that is left; layers of one kind averaged.", _widths),
        "Jump at a resize": (
            "Distance to the teacher just before (hollow) and just after (filled) every resize.",
            _gap,
        ),
        "Held-out values": (
            f"Held-out {fixed_rows(run)}: the run, its controls, and the teacher on all held-out rows. "
            "The last panel shows the terms on the probe batch.",
            _heldout,
        ),
        "Speed and memory": ("Tokens per second over all ranks without pauses, and memory of the first rank.", _speed),
        "Optimizer": ("Learning rate, and the global gradient norm before clipping.", _optimizer),
    }
    return [curve(title, caption, build(run)) for title, (caption, build) in builders.items()]


def fixed_rows(*runs: Run) -> str:
    """What held-out values are taken over, in words."""
    return "rows" if all(run.task == "causal" for run in runs) else "rows with masks that never change"


def curve(title: str, caption: str, panels: list[Panel]) -> Curve:
    """A figure of those `panels` in which there is something to draw."""
    panels = [panel for panel in panels if any(value is not None for x in panel.lines for _, value in x.points)]
    if any(len(line.points) > MAX_POINTS for panel in panels if not panel.saw_tooth for line in panel.lines):
        caption += f" Lines show at most {MAX_POINTS} of the logged points."
    return Curve(title, caption, panels)


def terms_of(*runs: Run) -> list[str]:
    """Names of the loss terms to draw: those of the paper, then all further ones that any of `runs` has logged."""
    logged = [name.removeprefix("loss/") for run in runs for name in run.names("loss/")]
    return list(dict.fromkeys([*_PAPERS_TERMS, *(name for name in logged if "/" not in name and name != "total")]))


def _line(run: Run, name: str, label: str) -> list[Line]:
    points = run.points(name)
    return [Line(label, points)] if points else []


def _losses(run: Run) -> list[Panel]:
    terms = [line for term in terms_of(run) for line in _line(run, f"loss/{term}", term_label(term, run.task))]
    total = Panel("total", _line(run, "loss/total", "total"), log_when_wide=True)
    return [total, Panel("terms", terms, log_when_wide=True)]


def _layer_terms(run: Run) -> list[Panel]:
    panels = []
    for term in terms_of(run):
        names = run.names(f"loss/{term}/layer.")
        labels = [name.rsplit(".", 1)[1] for name in names]
        shades = [_shade(i, len(names)) for i in range(len(names))]
        lines = [Line(x, run.points(name), shade) for name, x, shade in zip(names, labels, shades, strict=True)]
        panels.append(Panel(f"{term_label(term, run.task)}, by layer", lines, log_when_wide=True))
    return panels


def _shade(i: int, count: int) -> str:
    """First layer light, last layer dark."""
    light, dark = (120, 152, 188), (10, 26, 48)
    share = i / (count - 1) if count > 1 else 1.0
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(light, dark, strict=True))


def _widths(run: Run) -> list[Panel]:
    history = width_history(run)
    share = []
    for family, label in FAMILIES.items():
        points = [(step, mean_width(widths, family)) for step, widths in history]
        points = [(step, width) for step, width in points if width is not None]
        if points and points[0][1]:
            first, last = points[0][1], points[-1][1]
            text = f"{label} {first:.4g} to {last:.4g}"
            share.append(Line(text, [(step, 100 * width / first) for step, width in points]))
    parameters = Panel("parameters", _line(run, "model/parameters", "parameters"), stairs=True, from_zero=True)
    return [Panel("% of the starting width", share, stairs=True, from_zero=True), parameters]


def width_history(run: Run) -> list[tuple[int, dict[str, int]]]:
    """(step, axis -> width) from the resize events, or from the logged widths if the run has no events.

    Only the resize events give the exact step of every change.
    """
    if run.events and all("widths_before" in event and "widths_after" in event for event in run.events):
        history = [(0, run.events[0]["widths_before"])]
        history += [(event["step"], event["widths_after"]) for event in run.events]
        return history + [(run.last_step, history[-1][1])]
    prefix = "widths/"
    logged = [(x["step"], {k[len(prefix) :]: v for k, v in x.items() if k.startswith(prefix)}) for x in run.train]
    return [(step, widths) for step, widths in logged if widths]


def mean_width(widths: dict[str, Any], family: str) -> float | None:
    """Width of a family of axes ("ffn": mean of layer.0.ffn, layer.1.ffn ...), None when it is not recorded."""
    of_kind = [v for axis, v in widths.items() if axis.rsplit(".", 1)[-1] == family and v is not None]
    return sum(of_kind) / len(of_kind) if of_kind else None


def _gap(run: Run) -> list[Panel]:
    """Terms of the probe batch at every resize; KL first, because small steps of pruning are meant to keep it small."""
    order = sorted(terms_of(run), key=lambda term: term != "kl")
    labels = [term_label(term, run.task) for term in order]
    return [
        Panel(f"{label}, probe batch", [Line(label, _pairs(run, term))], saw_tooth=True)
        for term, label in zip(order, labels, strict=True)
    ]


def _pairs(run: Run, term: str) -> Points:
    """(step, before), (step, after) of every event that measured `term`."""
    pairs: Points = []
    for event in run.events:
        before, after = gap(event, "gap_before", term), gap(event, "gap_after", term)
        if before is not None and after is not None:
            pairs += [(event["step"], before), (event["step"], after)]
    return pairs


def gap(event: dict[str, Any], side: str, term: str) -> float | None:
    """Value of `term` in an event's "gap_before" or "gap_after", None when it was not measured."""
    return (event.get(side) or {}).get(term)


def _heldout(run: Run) -> list[Panel]:
    """Results of every evaluation with those of the teacher and the controls, then the terms of the probe batch."""
    names = [name for name in run.evaluation_names() if not name.startswith("gap/")]
    panels = [
        Panel(name.replace("_", " "), _compared(run, name), from_zero=name == "kl_to_teacher")
        for name in names
        if run.evaluation_points(name)
    ]
    probe = [Line(term_label(term, run.task), run.evaluation_points(f"gap/{term}")) for term in terms_of(run)]
    return [*panels, Panel("terms, probe batch", [line for line in probe if line.points], log_when_wide=True)]


def _compared(run: Run, name: str) -> list[Line]:
    """The line of the run, those of its controls at the final size, and a level line at the teacher's value."""
    lines = [Line(run.name[:_LONGEST_LABEL], run.evaluation_points(name))]
    for control in final_controls(run):
        points = run.controls[control].evaluation_points(name)
        lines += [Line(control[:_LONGEST_LABEL], points)] if points else []
    value = teacher_value(run, name)
    if value is not None:
        steps = [step for line in lines for step, _ in line.points]
        lines.append(Line("teacher", [(min(steps), value), (max(steps), value)], style=TEACHER_STYLE))
    return lines


def final_controls(run: Run) -> list[str]:
    """Names of the controls that end at the size of the run (`run.compare` of its config), at most 4.

    If none of these has been run: the first few controls of the run folder.
    """
    wanted = run.config.get("run", {}).get("compare") if isinstance(run.config.get("run"), dict) else None
    names = [name for name in run.controls if isinstance(wanted, list) and name in wanted]
    return (names or list(run.controls))[:_MOST_CONTROLS]


def teacher_value(run: Run, name: str) -> float | None:
    """What the result table says of the teacher for a held-out value of the log; the KL to itself is left out."""
    column = HELDOUT_COLUMNS.get(name)
    return number(run.teacher.get(column)) if column not in (None, "kl_to_teacher") else None


def _speed(run: Run) -> list[Panel]:
    def scaled(name: str, factor: float) -> Points:
        return [(step, None if value is None else value * factor) for step, value in run.points(name)]

    memory = [
        Line("resident", scaled("memory/rss_bytes", 2**-20)),
        Line("accelerator", scaled("memory/accelerator_bytes", 2**-20)),
    ]
    return [
        Panel("tokens/s", _line(run, "speed/tokens_per_s", "tokens/s"), from_zero=True),
        Panel("MFU, % of the device's peak", [Line("MFU", scaled("speed/mfu", 100))], from_zero=True),
        Panel("memory, MiB", [line for line in memory if line.points], from_zero=True),
        Panel("resize, ms", [Line("ms", [(e["step"], e.get("milliseconds")) for e in run.events])], from_zero=True),
    ]


def _optimizer(run: Run) -> list[Panel]:
    return [
        Panel("learning rate", _line(run, "optim/lr", "learning rate"), from_zero=True),
        Panel("gradient norm", _line(run, "optim/grad_norm", "gradient norm"), log_when_wide=True, from_zero=True),
    ]
