"""How the training step scales: measured over the ranks of this machine, and PREDICTED for 8 to 1,024 GPUs.

    python -m benchmarks.speed.scaling                             # 1 .. all cores (GPUs), a model of communication
    python -m benchmarks.speed.scaling --quick                     # under 90 s
    python -m benchmarks.speed.scaling --tokens-per-s 400000 --inside-gb-per-s 230 --outside-gb-per-s 46
    python -m benchmarks.speed.scaling --throughput results.json   # tokens/s of a GPU from throughput.py's rows

Measured: weak scaling, the same sequences a rank; a rank has one thread (or one GPU). Three jobs of the product's own
step: one rank alone; as many single-rank jobs side by side (what sharing the machine costs, without any communication);
all ranks together. Calibrated: seconds against bytes of the process group's all-reduce, a line through the medians.
Compared: side by side + communication by the formula, with the step of all ranks together.

Predicted (formula and what every ZeRO stage sends: communication.py): the calibration of this machine says nothing
about another's network, so bandwidths, latencies and the share of overlap are arguments; the defaults are assumptions.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.harness.environment import ROOT, environment
from benchmarks.harness.launch import hand_back, is_rank, run_ranks
from benchmarks.harness.run import parser, publish
from benchmarks.harness.shapes import SHAPES
from benchmarks.speed.communication import Network
from benchmarks.speed.scaling_report import report, rows
from benchmarks.speed.scaling_run import run_job

MODULE = "benchmarks.speed.scaling"
GPUS = [8, 16, 32, 64, 128, 256, 512, 1024]
STEPS = {"standard": 12, "quick": 5}


def parse_args() -> argparse.Namespace:
    made = parser(__doc__, quick="fewer steps, largest number of ranks only")
    made.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="section.field=value of the run that is measured"
    )
    made.add_argument("--shape", choices=list(SHAPES), default="quickstart", help="what is measured here")
    made.add_argument("--deepspeed", type=Path, default=ROOT / "ds_configs" / "zero2.json")
    made.add_argument("--max-ranks", type=int, help="on this machine (default: GPUs, or cores)")
    predicted = made.add_argument_group("prediction")
    predicted.add_argument("--tokens-per-s", type=float, default=150_000.0, help="of one GPU (150,000: an assumption)")
    predicted.add_argument("--throughput", type=Path, help="rows of throughput.py to take it from")
    predicted.add_argument("--parameters", type=float, default=117.2e6, help="student + projections (BERT-base, full)")
    predicted.add_argument("--stage", type=int, choices=range(4), default=2, help="of ZeRO")
    predicted.add_argument("--sequences-per-gpu", type=int, default=128, help="weak scaling: a step, one micro-batch")
    predicted.add_argument("--global-batch-size", type=int, default=4096, help="strong scaling: sequences a step")
    predicted.add_argument("--seq-len", type=int, default=128)
    predicted.add_argument("--overlap", type=float, default=0.7, help="of the gradients' reduction with the backward")
    predicted.add_argument("--gpus-per-node", type=int, default=Network.gpus_per_node)
    predicted.add_argument("--inside-gb-per-s", type=float, default=Network.inside_bytes_per_s / 1e9)
    predicted.add_argument("--outside-gb-per-s", type=float, default=Network.outside_bytes_per_s / 1e9, help="a GPU")
    predicted.add_argument("--inside-latency-us", type=float, default=Network.inside_latency_s * 1e6)
    predicted.add_argument("--outside-latency-us", type=float, default=Network.outside_latency_s * 1e6)
    made.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    made.add_argument("--side-by-side", type=int, default=0, help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.throughput:
        args.tokens_per_s = tokens_per_s_of(json.loads(args.throughput.read_text(encoding="utf-8")))
    return args


def tokens_per_s_of(entries: list[dict]) -> float:
    """Tokens/s of one rank over the recipe's schedule, out of rows of `throughput.py`: its first shape of BERT-base."""
    for entry in entries:
        if entry["variant"].startswith("homobert") and (entry["metric"], entry["x"]) == ("tokens_per_s", "recipe"):
            return entry["value"] / entry["config"]["ranks"]
    raise SystemExit("error: --throughput: no row (homobert-..., tokens_per_s, recipe); run throughput.py with a shape")


def measure(args: argparse.Namespace, num_ranks: int) -> dict:
    """Job -> what its rank 0 measured."""
    options = ["--shape", args.shape, "--deepspeed", str(args.deepspeed.resolve()), *["--quick"] * args.quick]
    options += ["--set", *args.set] if args.set else []

    def job(count: int, work: Path, side_by_side: int = 0, environment: dict | None = None) -> dict:
        work.mkdir()
        further = ["--work", str(work), "--side-by-side", str(side_by_side)]
        return run_ranks(MODULE, [*options, *further], count, environment or {})

    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(num_ranks) as pool:
        folder = Path(name)
        alone = job(1, folder / "alone")
        environments = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpu_names(num_ranks)]
        apart = [pool.submit(job, 1, folder / f"{i}", num_ranks, env) for i, env in enumerate(environments)]
        apart = [future.result() for future in apart]
        return {"alone": alone, "side by side": apart[0], "together": job(num_ranks, folder / "together")}


def gpu_names(count: int) -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else [str(i) for i in range(count)])[:count]


def main() -> None:
    args = parse_args()
    if is_rank():
        hand_back(run_job(args, STEPS["quick" if args.quick else "standard"]))
        return
    most = args.max_ranks or (torch.cuda.device_count() if torch.cuda.is_available() else os.cpu_count() or 1)
    counts = [n for n in (2, 4, 8, 16) if n <= most]
    measured = {n: measure(args, n) for n in (counts[-1:] if args.quick else counts)}
    config = {"quick": args.quick, "shape": args.shape, "engine": args.deepspeed.name, **environment()}
    publish("scaling", report(measured, args, GPUS), rows(measured, args, GPUS, config), args)


if __name__ == "__main__":
    main()
