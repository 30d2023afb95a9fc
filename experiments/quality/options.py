"""What all studies are told on the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.environment import ROOT
from experiments.quality.arms import ABLATED_ARM, ARMS, Arm

WORK = Path("~/.cache/homodistil/quality")
QUICK = (
    "teacher.correction_steps=5",
    "train.global_batch_size=8",
    "train.micro_batch_size=8",
    "pruning.interval_steps=1",
    "pruning.max_event_fraction=0.9",
    "pruning.calibration_batches=2",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of one study."""

    study: str
    steps: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    widths: tuple[str, ...]
    arms: tuple[str, ...]
    work: Path
    workers: int
    deepspeed: Path
    quick: bool
    set: tuple[str, ...]
    """Overrides behind those of every arm."""
    tune: bool
    base: str
    budget_minutes: float | None
    eval_blocks: int | None = None
    own_rates: bool = False
    """Every method has a grid around its own usual rate, instead of `rates`."""

    def grid(self, arm: Arm, width: str) -> tuple[float, ...]:
        """Learning rates that the method is tried with at this width, ascending."""
        if not self.own_rates:
            return self.rates
        usual = arm.rate * _NARROW.get(width, 1)
        return usual / 2, usual, usual * 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", choices=["main", "gap", "map", "ablate"])
    parser.add_argument("--steps", type=int, help="optimizer steps of a run (map: of its shortest)")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates, ascending, for all methods")
    parser.add_argument("--seeds", type=int, nargs="+", help="the first chooses the learning rates")
    parser.add_argument("--widths", nargs="+", choices=["half", "quarter", "eighth"])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="main: see arms.py")
    parser.add_argument("--base", choices=list(ARMS), help="ablate: the arm that is varied")
    parser.add_argument("--budget-minutes", type=float, help="map: what does not fit is left out, and named")
    parser.add_argument("--no-tune", action="store_true", help="main: no fine-tuning")
    parser.add_argument("--work", type=Path, default=WORK, help=f"results of single runs, shared (default {WORK})")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--deepspeed", type=Path, default=ROOT / "ds_configs" / "zero2.json", help="precision, stage")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="of every run, behind its arm's")


# (steps, widths) where nothing was said.
_DEFAULTS = {
    "main": (240, ("half", "quarter")),
    "gap": (240, ("half",)),
    "map": (75, ("half", "quarter", "eighth")),
    "ablate": (240, ("half",)),
}

_RATES = (3e-3, 6e-3, 1.2e-2)
_NARROW = {"quarter": 2, "eighth": 4}
"""How much higher the best rate lies than at half width, roughly, for every method."""


def options_of(args: argparse.Namespace) -> Options:
    """The study's defaults where nothing was said."""
    quick = args.quick
    steps, widths = (6, ("half",)) if quick else _DEFAULTS[args.study]
    return Options(
        study=args.study,
        steps=args.steps or steps,
        rates=tuple(args.rates or (_RATES[:2] if quick else _RATES)),
        seeds=tuple(args.seeds or ((0, 1) if quick else (0, 1, 2))),
        widths=tuple(args.widths or widths),
        arms=tuple(
            args.arms
            or (("homodistil", "one_shot") if quick else (name for name, arm in ARMS.items() if not arm.is_extra))
        ),
        work=args.work.expanduser(),
        workers=args.workers,
        deepspeed=args.deepspeed,
        quick=quick,
        set=(*(QUICK if quick else ()), *args.set),
        tune=not args.no_tune,
        base=args.base or ("homodistil" if quick else ABLATED_ARM),
        budget_minutes=args.budget_minutes,
        eval_blocks=64 if quick else None,
        own_rates=args.study == "main" and not (args.rates or quick),
    )
