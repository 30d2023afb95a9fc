"""The family of a run: a stock checkpoint at every milestone, measured, and what is known of each in family.json.

    family.json   [{"milestone": 0.75, "folder": "export/milestone-0.75", "step": 120, ...}, ...]

A checkpoint is written first, its record last: a job that is killed between the two exports that milestone again, from
the same weights; one that has been recorded is never exported again.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from homodistil.config.schema import RunConfig
from homodistil.distributed import ranks
from homodistil.distributed.fault_injection import fault_point
from homodistil.engine.engine import TrainingEngine
from homodistil.errors import UserError
from homodistil.files import to_json, write_atomically, writing
from homodistil.metrics.recorder import METRICS_FILE, read_lines
from homodistil.models.axes import Widths, layer_widths
from homodistil.pruning.milestones import Milestone, milestone_name
from homodistil.training.exporter import Exporter
from homodistil.training.run_folder import EXPORT_FOLDER
from homodistil.training.train_state import TrainState

FAMILY_FILE = "family.json"


class Family:
    """Exports and records the milestones of a run.

    Args:
        evaluate: the student's scores on all held-out text, as a result row has them.
    """

    def __init__(
        self, config: RunConfig, folder: Path, exporter: Exporter, evaluate: Callable[[], dict[str, Any]]
    ) -> None:
        self.config, self.folder, self._exporter, self._evaluate = config, folder, exporter, evaluate
        self._seen: set[float] = set()
        """Milestones that this process has dealt with: they stay due until the next event."""

    def export(self, engine: TrainingEngine, milestone: Milestone, state: TrainState) -> None:
        """Export and record the engine's student as `milestone`, unless that has been done. Every rank calls it."""
        if milestone.fraction in self._seen:
            return
        self._seen.add(milestone.fraction)
        folder = milestone_folder(self.folder, milestone.fraction)
        if ranks.on_rank_zero(lambda: self._is_done(folder, milestone.fraction)):
            return
        measured = self._evaluate() | self._facts(milestone, state)
        speed = self._exporter.export(engine, folder, measured, with_speed=True)
        fault_point("family.exported")
        ranks.on_rank_zero(lambda: self._record(folder, measured | speed))

    def _is_done(self, folder: Path, fraction: float) -> bool:
        return (folder / "config.json").is_file() and any(r["milestone"] == fraction for r in read_family(self.folder))

    def _facts(self, milestone: Milestone, state: TrainState) -> dict[str, Any]:
        widths, tokens = milestone.widths, state.consumed_samples * self.config.data.seq_len
        speed = ranks.on_rank_zero(lambda: tokens_per_s_at(widths, read_lines(self.folder / METRICS_FILE)))
        return {
            "milestone": milestone.fraction,
            "step": state.step,
            "settle_steps": self.config.run.settle_steps,
            "training_tokens": tokens,
            "tokens_per_s_training": speed,
            "intermediate_size": layer_widths(widths, 0).intermediate_size,
            "num_attention_heads": layer_widths(widths, 0).num_heads,
        }

    def _record(self, folder: Path, measured: Mapping[str, Any]) -> None:
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        record = {"folder": str(folder.relative_to(self.folder)), **measured, "weights_bytes": weights}
        rest = [r for r in read_family(self.folder) if r["milestone"] != record["milestone"]]
        records = sorted([*rest, record], key=lambda r: -r["milestone"])
        text = ",\n ".join(map(to_json, records))
        with writing(self.folder / FAMILY_FILE):
            write_atomically(self.folder / FAMILY_FILE, f"[{text}]\n")


def milestone_folder(run_dir: Path, fraction: float) -> Path:
    return run_dir / EXPORT_FOLDER / f"milestone-{milestone_name(fraction)}"


def read_family(run_dir: Path) -> list[dict[str, Any]]:
    """Records of the milestones exported so far, widest first. Raises `UserError` when they cannot be read."""
    path = run_dir / FAMILY_FILE
    if not path.is_file():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        is_record = [isinstance(record, dict) and {"milestone", "step"} <= record.keys() for record in records]
        if not isinstance(records, list) or not all(is_record):
            raise ValueError("no list of milestones with their steps")
        return records
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it, or choose another run.dir") from None


def family_rows(student: dict[str, Any], members: list[dict[str, Any]], last_step: int) -> list[dict[str, Any]]:
    """Rows of the result table: the student, which is its family's last member if that one settled until the end
    (`last_step`), and the others by their milestones, widest first."""
    last = next((member for member in members if member["step"] == last_step), {})
    rest = [
        {**member, "name": f"{student['name']} @ {milestone_name(member['milestone'])}"}
        for member in members
        if member is not last
    ]
    return [*rest, {**last, **student}]


def tokens_per_s_at(widths: Widths, metrics: list[dict[str, Any]]) -> float | None:
    """Median training speed of the logged intervals that ended at these widths; None: none did.

    Args:
        metrics: lines of metrics.jsonl. The first such interval may have begun wider, and counts only if it is alone.
    """
    at_widths = [line for line in metrics if all(line.get(f"widths/{axis}") == width for axis, width in widths.items())]
    speeds = [line["speed/tokens_per_s"] for line in at_widths if line.get("speed/tokens_per_s") is not None]
    return statistics.median(speeds[1:] or speeds) if speeds else None
