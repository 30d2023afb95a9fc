"""The line of a resize event in events.jsonl."""

from __future__ import annotations

from homodistil.models.resize_plan import ResizePlan


def resize_event(step: int, plan: ResizePlan, before: dict[str, float], after: dict[str, float]) -> dict:
    """A line of events.jsonl: widths that changed, gap before and after, the keep's hash."""
    changed = [axis for axis, width in plan.widths_after.items() if width != plan.widths_before[axis]]
    return {
        "step": step,
        "hash": plan.hash,
        "widths_before": plan.widths_before,
        "widths_after": plan.widths_after,
        "changed": changed,
        "gap_before": before,
        "gap_after": after,
    }
