"""How the training step scales: measured over the ranks of this machine, and PREDICTED for 8 to 1,024 GPUs.

    python benchmarks/scaling.py                                    # 1 .. all cores (GPUs), a model of communication
    python benchmarks/scaling.py --quick                            # under 90 s
    python benchmarks/scaling.py --tokens-per-s 400000 --gpus-per-node 8 --inside-gb-per-s 230 --outside-gb-per-s 46
    python benchmarks/scaling.py --throughput results.json          # tokens/s a GPU from throughput.py's rows

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
from pathlib import Path

import torch
from communication import Network
from launch import ROOT, hand_back, is_rank, run_ranks
from report import environment, result_path, write, write_json
from scaling_tables import report, rows
from shapes import SHAPES

GPUS = [8, 16, 32, 64, 128, 256, 512, 1024]
STEPS = {"standard": 12, "quick": 5}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="section.field=value of the run config that is measured",
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="quickstart", help="what is measured here")
    parser.add_argument("--deepspeed", type=Path, default=ROOT / "ds_configs" / "zero2.json")
    parser.add_argument("--max-ranks", type=int, help="on this machine (default: GPUs, or cores)")
    parser.add_argument("--quick", action="store_true", help="fewer steps, largest number of ranks only")
    parser.add_argument("--json", type=Path, help="write rows here, and nothing under benchmarks/results/")
    predicted = parser.add_argument_group("prediction")
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
    for hidden in ("--work", "--job"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
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
    found = {}
    for job, ranks in (("alone", 1), ("side by side", num_ranks), ("together", num_ranks)):
        with tempfile.TemporaryDirectory() as work:
            options = ["--shape", args.shape, "--deepspeed", str(args.deepspeed.resolve())]
            options += ["--work", work, "--job", job, *["--quick"] * args.quick]
            options += ["--set", *args.set] if args.set else []
            found[job] = run_ranks(str(Path(__file__).resolve()), options, ranks, {})
    return found


def main() -> None:
    args = parse_args()
    if is_rank():
        from scaling_run import run_job

        hand_back(run_job(args, STEPS["quick" if args.quick else "standard"]))
        return
    most = args.max_ranks or (torch.cuda.device_count() if torch.cuda.is_available() else os.cpu_count() or 1)
    counts = [n for n in (2, 4, 8, 16) if n <= most]
    measured = {n: measure(args, n) for n in (counts[-1:] if args.quick else counts)}
    text = report(measured, args, GPUS)
    print(text)
    config = {"quick": args.quick, "shape": args.shape, "engine": args.deepspeed.name, **environment()}
    if args.json or not args.quick:
        write_json(args.json or result_path("scaling", ".json"), rows(measured, args, GPUS, config))
    if not args.json and not args.quick:
        write(result_path("scaling", ".md"), text)


if __name__ == "__main__":
    main()
