"""The actions of launcher/plan.py: show a plan, or measure this machine for later plans."""

from __future__ import annotations

import argparse
import json
import os
import platform

from homodistil.config.command_line import Job
from homodistil.config.derive import compressed_schedule
from homodistil.config.schema import DataConfig
from homodistil.distributed import ranks
from homodistil.engine.build import init_ranks, load_engine_config
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
from homodistil.training.resolve import resolve_run
from homodistil.training.teacher_checks import check_plannable


def show(job: Job, options: argparse.Namespace) -> None:
    """Print the plan, and write it to the file of --json, if given. Raises `UserError`."""
    cluster = _cluster(options)
    resolved = check_plannable(job.config)
    raw, calibration = load_engine_config(job.engine_config), _calibration(job.config.data, options)
    plan = make_plan(resolved, raw, cluster, calibration, options.price, options.watts)
    if options.json:
        with writing(options.json):
            options.json.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(options.json, json.dumps(plan.to_dict(), indent=1) + "\n")
    print(format_plan(plan))


def measure(job: Job, options: argparse.Namespace) -> None:
    """Measure this machine; rank 0 writes the calibration. Every rank calls it, in a process that does nothing else.

    Raises:
        UserError: the config cannot be run, or the calibration not be written.
    """
    from homodistil.planning.measure import measure_trainer, samples_of
    from homodistil.training.short_runs import measurement

    raw = load_engine_config(job.engine_config)
    device = init_ranks(job.config.run.rank_timeout_s)
    with measurement(job.config, raw, device) as trainer:
        measured = measure_trainer(trainer, device)
    if ranks.rank() == 0:
        cluster = find_cluster(options.device, ranks.world_size())
        path = options.calibration or calibration_path(job.config.data)
        peak = peak_flops("cuda" if options.device != CPU else "cpu", student_dtype(raw)).flops_per_s
        samples = samples_of(resolve_run(compressed_schedule(job.config)), raw, cluster, measured)
        calibration = fit(samples, machine_name(), expected_seconds(cluster, peak))
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


def _calibration(data: DataConfig, options: argparse.Namespace) -> Calibration | None:
    """The calibration in the file of --calibration; else, with --device cpu, the one of this machine.

    None for a GPU without --calibration. Raises `UserError` if a CPU has not been measured.
    """
    if options.calibration:
        return read_calibration(options.calibration)
    path = calibration_path(data)
    if options.device != CPU:
        return None
    if not path.is_file():
        raise UserError(
            f"--device: found cpu, whose speed only a measurement tells, and there is none in {path.parent}; run "
            f"launcher/plan.py --measure with the same arguments first, on as many ranks (deepspeed --num_accelerators)"
        )
    return read_calibration(path)
