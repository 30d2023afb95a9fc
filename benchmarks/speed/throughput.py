"""Speed of the product's training step, part by part, at every width from full to target and over a whole schedule.

    python -m benchmarks.speed.throughput                              # one rank, all cores
    python -m benchmarks.speed.throughput --quick                      # under 90 s on 2 cores
    python -m benchmarks.speed.throughput --world-size 2 --deepspeed ds_configs/zero2_fp32.json --json out.json
    python -m benchmarks.speed.throughput --shapes homobert-base --set train.micro_batch_size=128

What runs is `Trainer.train_step` with the real engine, teacher, student, feed, pruner and monitor (harness/product.py);
its parts are those that it labels for torch.profiler (harness/step_parts.py). The run is one cubic schedule of seven
events (quick: four), t_f = 0.7 T; the first step behind every event is left out (new shapes). A rank's numbers are rank
0's. FLOPs are model FLOPs, each counted once (flops.py); the GEMM peak is the datasheet's for a GPU known by
name, and else measured in the same process with the same threads and precision, the best of three measurements.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch

from benchmarks.harness.environment import ROOT, environment
from benchmarks.harness.launch import hand_back, is_rank, run_ranks
from benchmarks.harness.run import parser, publish
from benchmarks.harness.shapes import SHAPES
from benchmarks.speed.throughput_report import report, rows
from benchmarks.speed.throughput_run import run_shape

MODULE = "benchmarks.speed.throughput"
STEPS_PER_WIDTH = {"cpu": 4, "quick": 2, "cuda": 12}


def default_shapes() -> list[str]:
    return ["homobert-base", "homobert-small"] if torch.cuda.is_available() else ["homobert-small", "quickstart"]


def parse_args() -> argparse.Namespace:
    made = parser(__doc__, quick="small batches, few steps")
    made.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="section.field=value of the run config"
    )
    made.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=default_shapes(), help="harness/shapes.py")
    made.add_argument("--deepspeed", type=Path, default=ROOT / "ds_configs" / "zero2.json", help="stage, precision")
    made.add_argument("--world-size", type=int, default=1, help="ranks on this machine")
    made.add_argument("--threads", type=int, help="of a rank on the CPU (default: cores / ranks)")
    made.add_argument("--steps-per-width", type=int, help="the first is left out (at least 2)")
    made.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = made.parse_args()
    device = "cuda" if torch.cuda.is_available() else "quick" if args.quick else "cpu"
    args.steps_per_width = max(2, args.steps_per_width or STEPS_PER_WIDTH[device])
    args.threads = args.threads or max(1, (os.cpu_count() or 1) // args.world_size)
    return args


def main() -> None:
    args = parse_args()
    if is_rank():
        from homodistil.engine.build import init_ranks

        hand_back(run_shape(args, init_ranks()))
        return
    results = {}
    for name in args.shapes:
        with tempfile.TemporaryDirectory() as work:
            options = ["--shapes", name, "--deepspeed", str(args.deepspeed.resolve()), "--work", work]
            options += ["--set", *args.set] if args.set else []
            options += ["--world-size", str(args.world_size), "--steps-per-width", str(args.steps_per_width)]
            options += ["--quick"] * args.quick
            threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": str(args.threads)}
            results[name] = run_ranks(MODULE, options, args.world_size, threads)
    config = {"quick": args.quick, "ranks": args.world_size, "threads": args.threads, **environment()}
    config |= {"engine": args.deepspeed.name, "overrides": args.set}
    publish("throughput", report(results, args), rows(results, config), args)


if __name__ == "__main__":
    main()
