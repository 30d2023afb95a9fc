"""A step of homodistil beside what a user would otherwise run: same teacher, student, batch, loss, precision, machine.

    python -m benchmarks.peers                                    # all parts, bf16 and fp32
    python -m benchmarks.peers --quick                            # under 90 s
    python -m benchmarks.peers --precision bf16 --parts steps schedule --json out.json

Peers: homodistil's own trainer (ours.py), masks at full width (masks.py), TextBrewer (textbrewer_loop.py) and a plain
Hugging Face loop (plain_loop.py); the workload and its loss are in workload.py. Every peer is a process of its own with
the same number of threads; they take turns, one step at a time, while the others sleep. Ratios are taken round by round
and then their median: a shared machine is too noisy for anything else. First every peer has to compute the same loss
terms on the same batch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.harness.environment import environment
from benchmarks.harness.run import parser, publish
from benchmarks.peers import measure, tables, totals
from benchmarks.peers.measure import Place
from benchmarks.peers.processes import PeerError, Variant, textbrewer_paths
from benchmarks.peers.stock_peer import SETTINGS
from benchmarks.peers.workload import SIZES, as_dict, prepare

PARTS = ["steps", "memory", "schedule"]
OURS = "homodistil"
MASKS, MASKS_GENEROUS = "(a) masks", "(a) masks, masked rows only"


def parse_args() -> argparse.Namespace:
    made = parser(__doc__, quick="small, bf16, one setting per peer")
    made.add_argument("--size", choices=list(SIZES), default="standard")
    made.add_argument("--precision", nargs="+", choices=list(SETTINGS), default=["bf16", "fp32"])
    made.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--widths", type=int, default=7, help="measured along the schedule")
    made.add_argument("--kl-positions", choices=["masked", "all"], default="masked")
    made.add_argument("--threads", type=int, default=2, help="of every peer")
    made.add_argument("--clock", choices=["wall", "processor"], default="wall", help="processor: on a busy machine")
    made.add_argument("--one-setting", action="store_true", help="the last of each peer's settings only")
    made.add_argument("--textbrewer", type=Path, default=Path("~/.cache/homodistil/textbrewer").expanduser())
    args = made.parse_args()
    if args.quick:
        args.size, args.precision, args.parts, args.one_setting = "quick", ["bf16"], ["steps", "schedule"], True
        args.rounds, args.widths = 3, 4
    return args


def all_variants(precision: str, args: argparse.Namespace) -> tuple[list[Variant], dict[str, str]]:
    """(ours first, then every peer in every setting; peer -> why it is left out)."""
    variants = [Variant(OURS, "ours", options={"widths": "final"})]
    settings, missing = SETTINGS[precision], {}
    if args.one_setting:
        settings = settings[-1:]
    for setting in settings:
        variants.append(Variant(MASKS, "masks", setting, {"rows": "all"}))
        variants.append(Variant(MASKS_GENEROUS, "masks", setting, {"rows": "masked"}))
        variants.append(Variant("(c) plain loop", "plain_loop", setting))
        try:
            variants.append(
                Variant("(b) TextBrewer", "textbrewer_loop", setting, paths=textbrewer_paths(args.textbrewer))
            )
        except PeerError as error:
            missing["(b) TextBrewer"] = str(error)
    return variants, missing


def run(precision: str, args: argparse.Namespace) -> dict:
    """All measurements in one precision."""
    task = replace(SIZES[args.size], precision=precision, kl_positions=args.kl_positions)
    variants, missing = all_variants(precision, args)
    results: dict = {"task": as_dict(task), "missing": missing}
    with tempfile.TemporaryDirectory() as folder:
        place = Place(task, prepare(task, Path(folder)), args.threads, args.clock)
        results["arithmetic"] = {one.label: totals.arithmetic(one, task, place.files) for one in variants}
        with measure.running(variants, place) as peers:
            results["terms"] = measure.same_loss(peers, place)
            if "steps" in args.parts:
                results["steps"] = measure.steps(peers, place, args.rounds)
        ours, masks = variants[0], _faster(variants, MASKS, results)
        if "memory" in args.parts:
            results["memory"] = measure.memory([*variants, _at_full_width(ours)], place)
        if "schedule" in args.parts:
            compared = [masks, _faster(variants, MASKS_GENEROUS, results)]
            results["curve"] = measure.curve(ours, compared, place, args.widths, max(2, args.rounds // 2))
    return results


def _at_full_width(ours: Variant) -> Variant:
    return replace(ours, name=f"{OURS}, full width", options={"widths": "full"})


def _faster(variants: list[Variant], name: str, results: dict) -> Variant:
    """The setting of this peer with the smaller median step (the last one if none was timed)."""
    named = [variant for variant in variants if variant.name == name]
    if "steps" not in results:
        return named[-1]
    return min(named, key=lambda variant: statistics.median(results["steps"][variant.label]))


def main() -> None:
    args = parse_args()
    results = {precision: run(precision, args) for precision in args.precision}
    config = {"device": "cpu", "size": args.size, "threads": args.threads, **environment()}
    publish("peers", tables.report(results, args), tables.rows(results, config), args)


if __name__ == "__main__":
    main()
