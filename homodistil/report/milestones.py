"""The family of a run (its milestones) as one table: size, quality and speed of every member, and of its controls.

The controls of a milestone are pruned to its widths at once and trained for the same number of steps. The control "own"
has a learning rate that falls to 0 within these steps; the control "run" has the learning rates that the milestone
itself was trained with (control_runs.py says why there are two).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from homodistil.metrics.result_table import aligned, cell, is_teacher
from homodistil.report.comparison.groups import models
from homodistil.report.comparison.scatter import scatter
from homodistil.report.figures import inline
from homodistil.report.page import TableSection
from homodistil.report.run import number

Row = Mapping[str, Any]

# Column -> (heading, how a number is written)
COLUMNS = {
    "name": ("model", "{}"),
    "step": ("steps", "{:,.0f}"),
    "hidden_size": ("hidden size", "{:.0f}"),
    "parameters": ("parameters", "{:,.0f}"),
    "weights_bytes": ("fp32 weights, MB", "{:,.1f}"),
    "heldout_mlm_loss": ("held-out MLM loss", "{:.3f}"),
    "difference": ("loss above the member's", "{:+.3f}"),
    "masked_top1": ("masked top-1", "{:.1%}"),
    "kl_to_teacher": ("KL to teacher", "{:.3f}"),
    "tokens_per_s_training": ("training tokens/s", "{:,.0f}"),
    "inference_latency_ms": ("ms per sequence", "{:.2f}"),
    "inference_tokens_per_s": ("inference tokens/s", "{:,.0f}"),
}
CAPTION = (
    "The members of the family, each with its controls below it, and how much higher (+: the member is better) or "
    "lower the held-out loss of a control is. Inference: the exported fp32 model, one sequence and a batch of "
    "32, on the first rank's device."
)


def family_section(rows: Sequence[Row]) -> TableSection | None:
    """The section on the family, from the rows of result.json; None if the run had no milestones."""
    members = _members(rows)
    if not members:
        return None
    ordered = _ordered(rows, members)
    figure = scatter(models([_point(row) for row in ordered]))
    description = "Size, quality and inference speed of the family's members and their controls."
    svg = inline(figure, "family", description) if figure else None
    return TableSection("Family", headings(), [_cells(row) for row in ordered], CAPTION, sentences(rows), svg)


def headings() -> list[str]:
    return [heading for heading, _ in COLUMNS.values()]


def family_text(rows: Sequence[Row]) -> str:
    """Table and sentences for the terminal; empty if the run had no milestones."""
    members = _members(rows)
    if not members:
        return ""
    table = aligned([headings(), *(_cells(row) for row in _ordered(rows, members))])
    return "\n".join([table, "", *sentences(rows)])


def sentences(rows: Sequence[Row]) -> list[str]:
    """One sentence per milestone: how much better or worse its held-out loss is than that of each control."""
    texts = []
    for member in _members(rows):
        against = [_verdict(member, control) for control in _controls(rows, member)]
        against = [text for text in against if text]
        if against:
            student = f"{member['student']}, milestone" if "student" in member else "Milestone"
            name = f"{student} {member['milestone']:g} (hidden size {member.get('hidden_size', 'unknown')})"
            texts.append(f"{name}: {'; '.join(against)}.")
    return texts


def _verdict(member: Row, control: Row) -> str:
    difference = _difference(member, control)
    if difference is None:
        return ""
    word = "better than" if difference >= 0 else "WORSE than"
    return f"{abs(difference):.3f} {word} {control.get('name', 'a control')}"


def _difference(member: Row, control: Row) -> float | None:
    """Held-out loss of the control minus that of the member, in nats; positive if the member is better."""
    ours, theirs = number(member.get("heldout_mlm_loss")), number(control.get("heldout_mlm_loss"))
    return None if ours is None or theirs is None else theirs - ours


def _members(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if number(row.get("milestone")) is not None and "rates" not in row]


def _controls(rows: Sequence[Row], member: Row) -> list[Row]:
    """The controls of `member`: those of the same milestone and, in a job with several students, the same student."""
    of_student = [row for row in rows if "rates" in row and row.get("student") == member.get("student")]
    return [row for row in of_student if row.get("milestone") == member["milestone"]]


def _ordered(rows: Sequence[Row], members: Sequence[Row]) -> list[Row]:
    """Teacher first, then each member with its controls."""
    teacher = [row for row in rows if is_teacher(row)]
    ordered = list(teacher)
    for member in members:
        ordered.append(member)
        ordered += [{**row, "difference": _difference(member, row)} for row in _controls(rows, member)]
    return ordered


def _cells(row: Row) -> list[str]:
    size = number(row.get("weights_bytes"))
    shown = {**row, "weights_bytes": None if size is None else size / 1e6}
    return [cell(shown.get(column), form) for column, (_, form) in COLUMNS.items()]


def _point(row: Row) -> dict[str, Any]:
    shown = ("name", "parameters", "hidden_size", "heldout_mlm_loss", "kl_to_teacher")
    return {name: row[name] for name in shown if name in row} | {"tokens_per_s": row.get("inference_tokens_per_s")}
