"""From measured points to a whole schedule, and the arithmetic that every peer asks of the machine."""

from __future__ import annotations

import bisect
import statistics
from dataclasses import dataclass

from benchmarks.peers.measure import Curve
from benchmarks.peers.processes import Variant
from benchmarks.peers.workload import Files, Task


@dataclass(frozen=True)
class Total:
    """Whole schedule against one other peer. Times in ms, at that peer's median step."""

    other_ms: float
    steps_ms: float
    """Ours, all steps."""
    moves_ms: float
    """Ours, the engine's part of all resize events."""
    probes_ms: float
    """Ours, the rest of them: measuring the gap before and after, milestones."""

    @property
    def ratio(self) -> float:
        return self.other_ms / (self.steps_ms + self.moves_ms + self.probes_ms)

    @property
    def ratio_without_probes(self) -> float:
        return self.other_ms / (self.steps_ms + self.moves_ms)


def whole_schedule(curve: Curve, label: str) -> Total:
    """Ours along the recipe's widths: at each width the median over rounds of ours / other, in between linear."""
    points = sorted(curve.points, key=lambda point: point.hidden)
    widths = [point.hidden for point in points]
    shares = [_median_ratio(point.ours_ms, point.others_ms[label]) for point in points]
    other = statistics.median(ms for point in points for ms in point.others_ms[label])
    share, width, step = 0.0, widths[-1], 0
    for at, narrower in [*curve.events, (curve.steps, 0)]:
        share += (at - step) * interpolate(widths, shares, width)
        step, width = at, narrower
    events = [point.event for point in curve.points if point.event]
    moves = statistics.mean(event["move_ms"] for event in events) * len(curve.events)
    whole = statistics.mean(event["ms"] for event in events) * len(curve.events)
    return Total(other * curve.steps, share * other, moves, whole - moves)


def _median_ratio(ours: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, other, strict=True))


def interpolate(xs: list[float], ys: list[float], x: float) -> float:
    """Linear between points, constant beyond them; xs ascending."""
    right = min(max(bisect.bisect_left(xs, x), 1), len(xs) - 1)
    left = right - 1
    part = min(max((x - xs[left]) / (xs[right] - xs[left]), 0.0), 1.0)
    return ys[left] + part * (ys[right] - ys[left])


def arithmetic(variant: Variant, task: Task, files: Files) -> float:
    """GFLOP of one step in matrix products (flops.py): what the peer's way asks for, however fast it is."""
    from transformers import AutoConfig, BertForMaskedLM

    from homodistil.config.schema import LossConfig
    from homodistil.models.encoders.bert import BERT as bert
    from homodistil.models.flops import step_flops

    batches = files.batches()
    masked = statistics.mean(int((batch["labels"] != -100).sum()) for batch in batches)
    full, cut = (_widths(bert, BertForMaskedLM, AutoConfig.from_pretrained(f)) for f in (files.teacher, files.student))
    all_rows = variant.module in ("plain_loop", "textbrewer_loop") or variant.options.get("rows") == "all"
    loss = LossConfig(kl=1.0, kl_positions=task.kl_positions, attention_target="probabilities", projection="student")
    return (
        step_flops(
            full if variant.module == "masks" else cut,
            full,
            loss,
            num_sequences=task.sequences,
            seq_len=task.tokens,
            target_rows=task.sequences * task.tokens if all_rows else masked,
            vocab_size=task.vocabulary,
        ).total
        / 1e9
    )


def _widths(family, model, config) -> dict[str, int]:
    import torch

    with torch.device("meta"):
        return family.axis_table(model(config)).widths
