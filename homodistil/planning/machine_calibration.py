"""Calibrates a machine: seconds per unit of each kind of work, by non-negative least squares over measured steps."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from homodistil.errors import UserError
from homodistil.files import write_atomically, writing
from homodistil.planning.step_work import NAMES, StepWork, as_row

FORMAT = 1
PULL = 0.02
"""Weight of the expected values relative to one sample; small, so that they matter only where samples do not decide."""


@dataclass(frozen=True)
class Sample:
    """One measured width."""

    work: StepWork
    wall_s: float
    """Seconds per step, the median of several."""
    cpu_s: float
    """Processor seconds per step of this rank."""
    peak_bytes: float
    """Peak memory of the rank."""
    counted_bytes: float
    """Peak memory as `memory.py` predicts it, without that of the process itself."""


@dataclass(frozen=True)
class Calibration:
    """How fast and how large steps are on this machine, fitted to measurements.

    Args:
        wall, cpu: seconds per unit of each field of `StepWork`.
        process_bytes: memory of a rank that `memory.py` does not count: libraries, their caches and workspaces.
        error: largest relative error of the wall time on the samples of the fit, at least 5 %.
        machine: name of the machine that was measured.
    """

    wall: dict[str, float]
    cpu: dict[str, float]
    process_bytes: float
    error: float
    machine: str

    def wall_s(self, work: StepWork) -> float:
        """Predicted wall seconds of a step."""
        return _dot(self.wall, work)

    def cpu_s(self, work: StepWork) -> float:
        """Predicted processor seconds of a step of one rank."""
        return _dot(self.cpu, work)


def fit(samples: Sequence[Sample], machine: str, expected: dict[str, float]) -> Calibration:
    """Fit a calibration to at least two samples of different widths, with equal weight for every relative error.

    Args:
        machine: name of the machine.
        expected: plausible seconds per unit for this machine (`speed.expected_seconds`). A few widths of one model do
            not determine the costs of all kinds of work; those that are not determined stay near these values.
    """
    wall, cpu = (_fit_times(samples, name, expected) for name in ("wall_s", "cpu_s"))
    errors = [abs(_dot(wall, s.work) / s.wall_s - 1) for s in samples]
    process_bytes = statistics.median(s.peak_bytes - s.counted_bytes for s in samples)
    return Calibration(wall, cpu, max(process_bytes, 0.0), max(0.05, *errors), machine)


def _fit_times(samples: Sequence[Sample], name: str, expected: dict[str, float]) -> dict[str, float]:
    """Least squares for seconds / expected, regularised towards a common factor: the whole machine may be slower."""
    scale = np.array([expected[field] for field in NAMES])
    measured = np.array([getattr(s, name) for s in samples])
    rows = np.array([as_row(s.work) for s in samples]) * scale / measured[:, None]
    common = 1.0 / np.median(rows.sum(axis=1))
    penalty = PULL * np.eye(len(NAMES))
    factors, _ = nnls(
        np.vstack([rows * common, penalty]), np.concatenate([np.ones(len(rows)), PULL * np.ones(len(NAMES))])
    )
    return dict(zip(NAMES, (factors * common * scale).tolist(), strict=True))


def _dot(seconds: dict[str, float], work: StepWork) -> float:
    return sum(seconds[name] * value for name, value in zip(NAMES, as_row(work), strict=True))


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write the calibration as JSON. Raises `UserError` if it cannot be written."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"format": FORMAT, **asdict(calibration)}, indent=1) + "\n")


def read_calibration(path: Path) -> Calibration:
    """Read a file of `write_calibration`. Raises `UserError` if it is missing or is not such a file."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe could wait for ever
            raise ValueError("not a regular file")
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT or not all(set(content[name]) == set(NAMES) for name in ("wall", "cpu")):
            raise ValueError("another format")
        numbers = [*content["wall"].values(), *content["cpu"].values(), content["process_bytes"], content["error"]]
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise ValueError("a number that is no measurement")
        return Calibration(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--calibration: cannot use {str(path)!r} ({reason}); make it with --measure") from None
