"""What measured steps say about a machine: seconds a unit of each kind of work, by non-negative least squares."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from homodistil.errors import UserError, writing
from homodistil.metrics import write_atomically
from homodistil.planning.step_work import NAMES, StepWork, as_row

FORMAT = 1


@dataclass(frozen=True)
class Sample:
    """One measured width."""

    work: StepWork
    wall_s: float
    """Of a step, the median of several."""
    cpu_s: float
    """Processor time of a step, of this rank."""
    peak_bytes: float
    """Of the rank, at its fullest moment."""
    counted_bytes: float
    """The same as `memory.py` predicts it, without the process's own."""


@dataclass(frozen=True)
class Calibration:
    """Args:
    wall, cpu: seconds a unit of each field of `StepWork`.
    process_bytes: what a rank holds beside what is counted.
    bytes_factor: bytes in use for each byte counted (allocators round, operations need workspaces).
    error: largest relative error of wall time on the samples themselves, at least 5 %.
    machine: where it was measured.
    """

    wall: dict[str, float]
    cpu: dict[str, float]
    process_bytes: float
    bytes_factor: float
    error: float
    machine: str

    def wall_s(self, work: StepWork) -> float:
        return _dot(self.wall, work)

    def cpu_s(self, work: StepWork) -> float:
        return _dot(self.cpu, work)

    def peak_bytes(self, counted_bytes: float) -> float:
        return self.process_bytes + self.bytes_factor * counted_bytes


def fit(samples: Sequence[Sample], machine: str) -> Calibration:
    """At least two samples, of different widths. Every relative error weighs the same."""
    wall, cpu = (_fit_times(samples, name) for name in ("wall_s", "cpu_s"))
    process_bytes, factor = _fit_bytes(samples)
    errors = [abs(_dot(wall, s.work) / s.wall_s - 1) for s in samples]
    return Calibration(wall, cpu, process_bytes, factor, max(0.05, *errors), machine)


def _fit_times(samples: Sequence[Sample], name: str) -> dict[str, float]:
    measured = np.array([getattr(s, name) for s in samples])
    rows = np.array([as_row(s.work) for s in samples])
    scale = np.maximum(rows.max(axis=0), 1e-30)
    found, _ = nnls(rows / scale / measured[:, None], np.ones(len(samples)))
    return dict(zip(NAMES, (found / scale).tolist(), strict=True))


def _fit_bytes(samples: Sequence[Sample]) -> tuple[float, float]:
    rows = np.array([[1e9, s.counted_bytes] for s in samples])
    measured = np.array([s.peak_bytes for s in samples])
    found, _ = nnls(rows / measured[:, None], np.ones(len(samples)))
    return float(found[0] * 1e9), float(found[1])


def _dot(seconds: dict[str, float], work: StepWork) -> float:
    return sum(seconds[name] * value for name, value in zip(NAMES, as_row(work), strict=True))


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Raises `UserError` when it cannot be written."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"format": FORMAT, **asdict(calibration)}, indent=1) + "\n")


def read_calibration(path: Path) -> Calibration:
    """Raises `UserError`: not there, or not one of ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT or set(content["wall"]) != set(NAMES):
            raise ValueError("another format")
        return Calibration(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--calibration: cannot use {str(path)!r} ({reason}); make it with --measure") from None
