"""The plan of the run that is starting, kept in its folder: the report shows it beside what came of it."""

from __future__ import annotations

import json
import platform
import re
import sys
from pathlib import Path

import torch

from homodistil.config.schema import RunConfig
from homodistil.files import write_atomically
from homodistil.metrics.result_table import PLAN_FILE
from homodistil.planning.cluster import CPU, Cluster, find_cluster
from homodistil.planning.machine_calibration import Calibration, read_calibration
from homodistil.planning.plan import make_plan

_NAMES = {
    r"A100.*80GB": "A100-80",
    r"A100": "A100-40",
    r"H100": "H100",
    r"H200": "H200",
    r"L40S": "L40S",
    r"RTX 4090": "RTX-4090",
}
"""The driver's name -> ours; the first that fits."""


def keep_plan(folder: Path, config: RunConfig, raw_engine_config: dict, num_ranks: int, num_machines: int) -> None:
    """Write plan.json into the run folder (one rank only), unless it is there or nothing is known of this machine."""
    path = folder / PLAN_FILE
    try:
        machine = None if path.exists() else _this_machine(config, num_ranks, num_machines)
        if machine is not None:
            plan = make_plan(config, raw_engine_config, *machine)
            write_atomically(path, json.dumps(plan.to_dict(), indent=1) + "\n")
    except Exception as error:  # a forecast that fails must not take the run with it
        print(f"warning: {PLAN_FILE} is not written ({type(error).__name__}: {error})", file=sys.stderr, flush=True)


def _this_machine(config: RunConfig, num_ranks: int, num_machines: int) -> tuple[Cluster, Calibration | None] | None:
    num_devices = max(1, num_ranks // num_machines)
    if torch.cuda.is_available():
        driver_name = torch.cuda.get_device_name()
        known = next((name for pattern, name in _NAMES.items() if re.search(pattern, driver_name)), None)
        return (find_cluster(known, num_devices, num_machines), None) if known else None
    path = calibration_path(config)
    return (find_cluster(CPU, num_ranks), read_calibration(path)) if path.is_file() else None


def calibration_path(config: RunConfig) -> Path:
    """Where `launcher/plan.py --measure` keeps what it found about this machine."""
    return Path(config.data.cache_dir).expanduser() / "plans" / f"calibration-{platform.node()}.json"
