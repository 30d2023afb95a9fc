"""What all studies are told on the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.environment import ROOT
from experiments.quality import decoder_arms, fine_tuning
from experiments.quality.arms import ABLATED_ARM, ARMS, SHAPES, UNTRAINED_RATE, Arm
from experiments.quality.embedder_arms import EMBEDDER_ARMS
from experiments.quality.refit_arms import REFERENCE, REFIT_ARMS
from homodistil.errors import UserError, nearest

WORK = Path("~/.cache/homodistil/quality")
CORRECTION = "teacher.correction_steps=5"
QUICK = (
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
    teacher: str = decoder_arms.SMOLLM2
    """decoder, refit: whose students are made."""
    layers: int = 0
    """decoder, refit: the first layers of the teacher that are kept of it (refit: 0 for all); embedder: its layers,
    repeated (0: as they are)."""
    lengths: tuple[int, ...] = (1,)
    """refit: of training, times the steps."""
    tasks: tuple[str, ...] = ()
    """refit: what the exports of the shortest runs are fine-tuned on."""
    task_rate: float = fine_tuning.RATE
    """refit: the learning rate of that."""
    is_listed: bool = False
    """decoder: print the runs and how long they take, and make none."""

    def grid(self, arm: Arm, width: str) -> tuple[float, ...]:
        """Learning rates that the method is tried with at this width, ascending."""
        if arm.is_untrained:
            return (UNTRAINED_RATE,)
        if not self.own_rates:
            return self.rates
        usual = arm.rate * _NARROW.get(width, 1)
        return usual / 2, usual, usual * 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", choices=list(_DEFAULTS))
    parser.add_argument("--steps", type=int, help="optimizer steps of a run (map, refit: of its shortest)")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates, ascending, for all methods")
    parser.add_argument("--seeds", type=int, nargs="+", help="the first chooses the learning rates")
    parser.add_argument("--widths", nargs="+", choices=list(SHAPES))
    parser.add_argument("--sizes", nargs="+", help="decoder: shares of the teacher's parameters (0.7 0.5)")
    parser.add_argument("--arms", nargs="+", help="see arms.py, decoder_arms.py, refit_arms.py, embedder_arms.py")
    parser.add_argument("--lengths", type=int, nargs="+", choices=LENGTHS, help="refit: of training, times --steps")
    tasks = list(fine_tuning.TASKS)
    parser.add_argument("--tasks", nargs="+", choices=tasks, help="refit: fine-tune the shortest runs' students on")
    parser.add_argument("--task-rate", type=float, default=fine_tuning.RATE, help="refit: learning rate of --tasks")
    parser.add_argument("--table", action="store_true", help="the page of what is there; makes no run")
    parser.add_argument("--teacher", help="decoder, refit: packaged one, GGUF file or folder")
    parser.add_argument(
        "--layers", type=int, help="decoder, refit: first layers of a decoder (30: whole); embedder: 12"
    )
    parser.add_argument("--list", action="store_true", help="decoder: all runs and the time they take; makes none")
    parser.add_argument("--base", choices=list(ARMS), help="ablate: the arm that is varied")
    parser.add_argument("--budget-minutes", type=float, help="map, refit: what does not fit is left out, and named")
    parser.add_argument("--no-tune", action="store_true", help="main: no fine-tuning")
    parser.add_argument("--work", type=Path, default=WORK, help=f"results of single runs, shared (default {WORK})")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--deepspeed", type=Path, default=ROOT / "ds_configs" / "zero2.json", help="precision, stage")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="of every run, behind its arm's")


LAYERS = 12
"""Of SmolLM2's 30: 71 of 135 million parameters, and a run of 128 steps within ten minutes of a core."""
_LAYERS = {"decoder": LAYERS}
_TEACHERS = {"refit": "embedded:bert-tiny"}
LENGTHS = (1, 4, 16)
"""Of training in the study refit, times the steps."""
_ARMS = {"decoder": decoder_arms.DECODER_ARMS, "refit": REFIT_ARMS, "embedder": EMBEDDER_ARMS}
"""Study -> its methods; of the others: ARMS."""
_QUICK_ARMS = {"decoder": ("none_one_shot", decoder_arms.LAYERS_KL), "refit": (REFERENCE, "none_one_shot")}
_QUICK_ARMS["embedder"] = ("ours", "layers", "ours_cut", "selection_cut")
_EVAL_BLOCKS = {"decoder": 128}
"""Study -> held-out blocks a half; the others take all, for their vocabulary is read at masked tokens alone."""

# (steps, widths) where nothing was said.
_DEFAULTS = {
    "main": (240, ("half", "quarter")),
    "gap": (240, ("half",)),
    "map": (75, ("half", "quarter", "eighth")),
    "ablate": (240, ("half",)),
    "decoder": (128, decoder_arms.SIZES),
    "refit": (240, ("half", "quarter")),
    "embedder": (240, ("half",)),
}

_RATES = (3e-3, 6e-3, 1.2e-2)
_NARROW = {"quarter": 2, "eighth": 4}
"""How much higher the best rate lies than at half width, roughly, for every method."""


def options_of(args: argparse.Namespace) -> Options:
    """The study's defaults where nothing was said."""
    quick = args.quick
    steps, widths = _DEFAULTS[args.study]
    if quick:
        steps, widths = 6, widths[:1]
    return Options(
        study=args.study,
        steps=args.steps or steps,
        rates=tuple(args.rates or (_RATES[:2] if quick else _RATES)),
        seeds=tuple(args.seeds or ((0, 1) if quick else (0, 1, 2))),
        widths=tuple((args.sizes if args.study == "decoder" else args.widths) or widths),
        arms=_chosen_arms(args),
        work=args.work.expanduser(),
        workers=args.workers,
        deepspeed=args.deepspeed,
        quick=quick,
        set=(*(_quick(args.study) if quick else ()), *args.set),
        tune=not args.no_tune and args.study != "decoder",
        base=args.base or ("homodistil" if quick else ABLATED_ARM),
        budget_minutes=0.0 if args.table else args.budget_minutes,
        eval_blocks=64 if quick else _EVAL_BLOCKS.get(args.study),
        own_rates=args.study in ("main", "decoder", "refit", "embedder") and not (args.rates or quick),
        teacher=args.teacher or _TEACHERS.get(args.study, decoder_arms.SMOLLM2),
        layers=_LAYERS.get(args.study, 0) if args.layers is None else args.layers,
        lengths=tuple(args.lengths or (LENGTHS[:1] if quick else LENGTHS)),
        tasks=tuple(args.tasks or ()),
        task_rate=args.task_rate,
        is_listed=args.list,
    )


def _quick(study: str) -> tuple[str, ...]:
    """Embedders have no language-modelling head that could be corrected."""
    return QUICK if study == "embedder" else (CORRECTION, *QUICK)


def _chosen_arms(args: argparse.Namespace) -> tuple[str, ...]:
    """Those that are named, or the study's. Raises `UserError` for an unknown one."""
    known = _ARMS.get(args.study, ARMS)
    for name in args.arms or ():
        if name not in known:
            raise UserError(f"--arms: found {name!r}, allowed: {', '.join(known)}{nearest(name, known)}")
    if args.quick and not args.arms:
        return _QUICK_ARMS.get(args.study, ("homodistil", "one_shot"))
    return tuple(args.arms or (name for name, arm in known.items() if not arm.is_extra))
