"""The actions of launcher/plan.py: show a plan, or measure this machine for later plans."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

from homodistil.config.schema import RunConfig
from homodistil.distributed import ranks
from homodistil.engine.build import load_engine_config
from homodistil.engine.ds_config import student_dtype
from homodistil.errors import UserError
from homodistil.files import write_atomically, writing
from homodistil.metrics.device_peak import peak_flops
from homodistil.planning.cluster import CPU, Cluster, find_cluster
from homodistil.planning.machine_calibration import Calibration, fit, read_calibration, write_calibration
from homodistil.planning.plan import make_plan
from homodistil.planning.save_plan import calibration_path
from homodistil.planning.speed import expected_seconds
from homodistil.planning.table import format_plan
from homodistil.training.inputs import check_plannable


def show(config: RunConfig, engine_config: Path, options: argparse.Namespace) -> None:
    """Print the plan, and write it to the file of --json, if given. Raises `UserError`."""
    cluster = _cluster(options)
    check_plannable(config)
    plan = make_plan(
        config, load_engine_config(engine_config), cluster, _calibration(config, options), options.price, options.watts
    )
    if options.json:
        with writing(options.json):
            options.json.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(options.json, json.dumps(plan.to_dict(), indent=1) + "\n")
    print(format_plan(plan))


def measure(config: RunConfig, engine_config: Path, options: argparse.Namespace) -> None:
    """Measure this machine; rank 0 writes the calibration. Every rank calls it. Raises `UserError`."""
    from homodistil.planning.measure import measure_here, samples_of

    raw = load_engine_config(engine_config)
    measured = measure_here(config, raw)
    if ranks.rank() == 0:
        cluster = find_cluster(options.device, ranks.world_size())
        path = options.calibration or calibration_path(config)
        peak = peak_flops("cuda" if options.device != CPU else "cpu", student_dtype(raw)).flops_per_s
        calibration = fit(samples_of(config, raw, cluster, measured), machine_name(), expected_seconds(cluster, peak))
        write_calibration(path, calibration)
        for one in measured:
            print(f"hidden {one.widths['hidden']}: {one.wall_s:.3f} s per step, {one.peak_bytes / 1e6:,.0f} MB")
        print(f"calibration: {path}")
    ranks.barrier()


def machine_name() -> str:
    """Name of this machine for plans."""
    return f"{platform.node()} ({os.cpu_count()} processors, {platform.machine()})"


def _cluster(options: argparse.Namespace) -> Cluster:
    return find_cluster(options.device, options.devices_per_node, options.nodes, options.interconnect)


def _calibration(config: RunConfig, options: argparse.Namespace) -> Calibration | None:
    """The calibration in the file of --calibration; else, with --device cpu, the one of this machine.

    None for a GPU without --calibration. Raises `UserError` if a CPU has not been measured.
    """
    if options.calibration:
        return read_calibration(options.calibration)
    path = calibration_path(config)
    if options.device != CPU:
        return None
    if not path.is_file():
        raise UserError(
            f"--device: found cpu, whose speed only a measurement tells, and there is none in {path.parent}; run "
            f"launcher/plan.py --measure with the same arguments first, on as many ranks (deepspeed --num_accelerators)"
        )
    return read_calibration(path)
