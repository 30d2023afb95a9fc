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

from benchmarks.peers import measure, tables, totals
from benchmarks.peers.measure import Place
from benchmarks.peers.processes import PeerError, Variant, textbrewer_paths
from benchmarks.peers.settings import SETTINGS
from benchmarks.peers.workload import SIZES, as_dict, prepare
from benchmarks.report import environment, result_path, write, write_json

PARTS = ["steps", "memory", "schedule", "run"]
OURS = "homodistil"
MASKS, MASKS_GENEROUS = "(a) masks", "(a) masks, masked rows only"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="standard")
    parser.add_argument("--quick", action="store_true", help="small, bf16, one setting a peer; leaves results/ alone")
    parser.add_argument("--precision", nargs="+", choices=list(SETTINGS), default=["bf16", "fp32"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--widths", type=int, default=7, help="measured along the schedule")
    parser.add_argument("--run-steps", type=int, default=20, help="of the real short run")
    parser.add_argument("--kl-positions", choices=["masked", "all"], default="masked")
    parser.add_argument("--threads", type=int, default=2, help="of every peer")
    parser.add_argument("--ranks", type=int, default=1, help="that homodistil shares its threads between")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall", help="processor: on a busy machine")
    parser.add_argument("--one-setting", action="store_true", help="the last of each peer's settings only")
    parser.add_argument("--textbrewer", type=Path, default=Path("~/.cache/homodistil/textbrewer").expanduser())
    parser.add_argument("--json", type=Path, help="write rows here, and nothing under benchmarks/results/")
    args = parser.parse_args()
    if args.quick:
        args.size, args.precision, args.parts, args.one_setting = "quick", ["bf16"], ["steps", "schedule"], True
        args.rounds, args.widths = 3, 4
    return args


def all_variants(precision: str, args: argparse.Namespace) -> tuple[list[Variant], dict[str, str]]:
    """(ours first, then every peer in every setting; peer -> why it is left out)."""
    found = [Variant(OURS, "ours", options={"widths": "final"}, num_ranks=args.ranks)]
    settings, missing = SETTINGS[precision], {}
    if args.one_setting:
        settings = settings[-1:]
    for setting in settings:
        found.append(Variant(MASKS, "masks", setting, {"rows": "all"}))
        found.append(Variant(MASKS_GENEROUS, "masks", setting, {"rows": "masked"}))
        found.append(Variant("(c) plain loop", "plain_loop", setting))
        try:
            found.append(Variant("(b) TextBrewer", "textbrewer_loop", setting, paths=textbrewer_paths(args.textbrewer)))
        except PeerError as error:
            missing["(b) TextBrewer"] = str(error)
    return found, missing


def run(precision: str, args: argparse.Namespace) -> dict:
    """All measurements in one precision."""
    task = replace(SIZES[args.size], precision=precision, kl_positions=args.kl_positions)
    variants, missing = all_variants(precision, args)
    found: dict = {"task": as_dict(task), "missing": missing}
    with tempfile.TemporaryDirectory() as folder:
        place = Place(task, prepare(task, Path(folder)), args.threads, args.clock)
        found["arithmetic"] = {one.label: totals.arithmetic(one, task, place.files) for one in variants}
        with measure.running(variants, place) as peers:
            found["terms"] = measure.same_loss(peers, place)
            if "steps" in args.parts:
                found["steps"] = measure.steps(peers, place, args.rounds)
        ours, masks = variants[0], _faster(variants, MASKS, found)
        if "memory" in args.parts:
            found["memory"] = measure.memory([*variants, _at_full_width(ours)], place)
        if "schedule" in args.parts:
            others = [masks, _faster(variants, MASKS_GENEROUS, found)]
            found["curve"] = measure.curve(ours, others, place, args.widths, max(2, args.rounds // 2))
        if "run" in args.parts:
            found["run"] = measure.short_run(ours, masks, place, args.run_steps)
    return found


def _at_full_width(ours: Variant) -> Variant:
    return replace(ours, name=f"{OURS}, full width", options={"widths": "full"})


def _faster(variants: list[Variant], name: str, found: dict) -> Variant:
    """The setting of this peer with the smaller median step (the last one if none was timed)."""
    own = [variant for variant in variants if variant.name == name]
    if "steps" not in found:
        return own[-1]
    return min(own, key=lambda variant: statistics.median(found["steps"][variant.label]))


def main() -> None:
    args = parse_args()
    results = {precision: run(precision, args) for precision in args.precision}
    text = tables.report(results, args)
    print(text)
    config = {"size": args.size, "threads": args.threads, "ranks": args.ranks, **environment()}
    if args.json or not args.quick:
        write_json(args.json or result_path("peers", ".json"), tables.rows(results, config))
    if not args.json and not args.quick:
        write(result_path("peers", ".md"), text)


if __name__ == "__main__":
    main()
