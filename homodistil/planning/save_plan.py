"""Writes the plan of a starting run into its folder; the report compares it with the measured values."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from homodistil.config.schema import DataConfig
from homodistil.files import write_atomically
from homodistil.metrics.result_table import PLAN_FILE
from homodistil.planning.cluster import CPU, Cluster, find_cluster
from homodistil.planning.machine_calibration import Calibration, read_calibration
from homodistil.planning.plan import make_plan
from homodistil.training.resolve import ResolvedRun

_NAMES = {
    r"A100.*80GB": "A100-80",
    r"A100": "A100-40",
    r"H100": "H100",
    r"H200": "H200",
    r"L40S": "L40S",
    r"RTX 4090": "RTX-4090",
}
"""Pattern in the driver's name -> key of `DEVICES`; the first match counts."""


def keep_plan(
    folder: Path,
    resolve: Callable[[], ResolvedRun],
    calibration: Path,
    raw_engine_config: dict,
    num_ranks: int,
    num_machines: int,
) -> None:
    """Write plan.json into the run folder, unless it exists or the speed of this machine is not known.

    Only one rank calls it. A plan that fails is reported as a warning.

    Args:
        resolve: gives the run; called if a plan is made.
        calibration: where the calibration of this machine is, if there is one (`calibration_path`).
        raw_engine_config: DeepSpeed's JSON as the user wrote it.
    """
    path = folder / PLAN_FILE
    try:
        machine = None if path.exists() else _this_machine(calibration, num_ranks, num_machines)
        if machine is not None:
            plan = make_plan(resolve(), raw_engine_config, *machine)
            write_atomically(path, json.dumps(plan.to_dict(), indent=1) + "\n")
    except Exception as error:  # a plan that fails must not end the run
        print(f"warning: {PLAN_FILE} is not written ({type(error).__name__}: {error})", file=sys.stderr, flush=True)


def _this_machine(calibration: Path, num_ranks: int, num_machines: int) -> tuple[Cluster, Calibration | None] | None:
    num_devices = max(1, num_ranks // num_machines)
    if torch.cuda.is_available():
        driver_name = torch.cuda.get_device_name()
        known = next((name for pattern, name in _NAMES.items() if re.search(pattern, driver_name)), None)
        return (find_cluster(known, num_devices, num_machines), None) if known else None
    return (find_cluster(CPU, num_ranks), read_calibration(calibration)) if calibration.is_file() else None


def calibration_path(data: DataConfig) -> Path:
    """The file in which `launcher/plan.py --measure` stores the calibration of this machine."""
    return Path(data.cache_dir).expanduser() / "plans" / f"calibration-{platform.node()}.json"
