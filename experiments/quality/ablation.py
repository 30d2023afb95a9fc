"""The study `ablate`: one thing changed at a time, three seeds, paired differences to the base.

Every variant is trained at the base's own best rate (chosen on the VALIDATION half, first seed): what is asked is what
the one change does, not what it would do with a rate of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.quality.arms import ARMS, BASE, EARLY, FULL, ONE_SHOT, OUR_WEIGHTS, SHAPES
from experiments.quality.comparison import Entry, try_rates
from experiments.quality.jobs import Train
from experiments.quality.options import Options
from experiments.quality.pool import Pool
from experiments.quality.specs import RunSpec
from homodistil.errors import UserError

SELECTION = ("pruning.compensation=none",)
REFIT = ("pruning.compensation=refit",)
GRADUAL = ("pruning.schedule=cubic",)
REWARM = (*OUR_WEIGHTS, "train.rewarm_steps=10")
BIG_EVENTS = "pruning.max_event_fraction=0.5"

VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "importance": {
        "sensitivity": ("pruning.importance=sensitivity",),
        "magnitude": ("pruning.importance=magnitude",),
        "random": ("pruning.importance=random",),
        "PLATON": ("pruning.importance=platon",),
        "KL to drawn labels of the teacher": ("pruning.importance=teacher_kl",),
        "sizes of activations (Minitron)": ("pruning.importance=activation",),
        "sensitivity, normalised per tensor": ("pruning.score_normalisation=per_tensor",),
    },
    "projection": {
        "student's side, learned": ("loss.projection=student", "loss.projection_learned=true"),
        "student's side, frozen": ("loss.projection=student", "loss.projection_learned=false"),
        "teacher's side, learned": ("loss.projection=teacher", "loss.projection_learned=true"),
        "teacher's side, frozen": ("loss.projection=teacher", "loss.projection_learned=false"),
    },
    "attention target": {
        "probabilities (MSE)": ("loss.attention_target=probabilities",),
        "probabilities (KL)": ("loss.attention_target=probabilities_kl",),
    },
    "loss removed": {name: (f"loss.{name}=0",) for name in ("mlm", "kl", "hidden", "attention", "embedding")},
    "loss weights": {
        "attention 0.1": ("loss.attention=0.1",),
        "KL 2": ("loss.kl=2",),
        "KL 4": ("loss.kl=4",),
        "KL 8": ("loss.kl=8",),
        "hidden 0.1": ("loss.hidden=0.1",),
    },
    "smoothing of importance": {
        "EMA beta 0": ("pruning.ema_beta=0",),
        "EMA beta 0.95": ("pruning.ema_beta=0.95",),
    },
    "end of pruning": {
        "t_f .05, events 3 steps apart": ("pruning.end_fraction=0.05", "pruning.interval_steps=3", BIG_EVENTS),
        "t_f .1, events 5 steps apart": ("pruning.end_fraction=0.1", "pruning.interval_steps=5", BIG_EVENTS),
        "t_f .3, events 10 steps apart": ("pruning.end_fraction=0.3", "pruning.interval_steps=10"),
        "t_f .7, events 20 steps apart": ("pruning.end_fraction=0.7", "pruning.interval_steps=20"),
    },
    "events": {
        "twice as many": ("pruning.interval_steps={half}",),
        "half as many": ("pruning.interval_steps={double}", "pruning.max_event_fraction=0.9"),
        "width multiple 8": ("pruning.width_multiple=8",),
        "width multiple 16": ("pruning.width_multiple=16",),
        "schedule linear": ("pruning.schedule=linear",),
        "schedule gap (closed loop)": ("pruning.schedule=gap",),
        "no protected outliers": ("pruning.protect_outliers=0",),
    },
    "optimizer at events": {
        "Adam's moments reset": ("pruning.carry_moments=false",),
        "learning rate climbs back over 10 steps": ("train.rewarm_steps=10",),
        "learning rate climbs back over 30 steps": ("train.rewarm_steps=30",),
    },
    "compensation": {
        "gradual, none": GRADUAL + SELECTION,
        "gradual, refit": GRADUAL + REFIT,
        "gradual, full, early": GRADUAL + FULL + EARLY,
        "one-shot, none": ONE_SHOT + SELECTION,
        "one-shot, refit": ONE_SHOT + REFIT,
        "one-shot, full": ONE_SHOT + FULL,
        "one-shot, full, two stages": (*ONE_SHOT, *FULL, "pruning.one_shot_stages=2"),
    },
    "what helped, together": {
        "KL 4, rate climbs back over 10": REWARM,
        "KL 4, rate climbs back over 10, twice as many events": (*REWARM, "pruning.interval_steps={half}"),
    },
}
ONLY_GRADUAL = ("smoothing of importance", "end of pruning", "events", "optimizer at events", "what helped, together")
"""Groups that mean nothing where everything is cut at step 0."""
QUICK_GROUPS = ("loss weights",)


@dataclass
class Variant:
    group: str
    name: str
    width: str
    runs: dict[int, dict] = field(default_factory=dict)
    """Seed -> measured."""
    refused: str = ""
    """Why the product does not run it with this base."""


@dataclass
class Ablation:
    base: dict[str, Entry]
    """Width -> the base with its rate and runs."""
    variants: list[Variant]


def run(pool: Pool, options: Options) -> Ablation:
    base = {width: Entry(ARMS[options.base], width) for width in options.widths}
    try_rates(pool, options, list(base.values()))
    plans: list[tuple[Entry | Variant, list[Train]]] = []
    for width, entry in base.items():
        if entry.rate is not None:
            plans += _plans(options, width, entry)
    cells = [(what, seed, job) for what, jobs in plans for seed, job in zip(options.seeds, jobs, strict=False)]
    for (what, seed, _), result in zip(cells, pool.run("ablation", [cell[2] for cell in cells]), strict=True):
        if result:
            what.runs[seed] = result
    return Ablation(base, [what for what, _ in plans if isinstance(what, Variant)])


def _plans(options: Options, width: str, entry: Entry) -> list[tuple[Entry | Variant, list[Train]]]:
    """Base and variants, each with a job a seed; variants that are the base itself are left out."""
    gradual = "pruning.schedule=one_shot" not in entry.arm.overrides
    base_jobs = [_job(options, entry, (), "base", seed) for seed in options.seeds]
    interval = base_jobs[0].spec.config().pruning.interval_steps
    plans: list[tuple[Entry | Variant, list[Train]]] = [(entry, base_jobs)]
    for group, variants in VARIANTS.items():
        if (group in ONLY_GRADUAL and not gradual) or (options.quick and group not in QUICK_GROUPS):
            continue
        for name, fields in variants.items():
            overrides = tuple(part.format(half=max(1, interval // 2), double=2 * interval) for part in fields)
            variant = Variant(group, name, width)
            jobs = [_job(options, entry, overrides, f"{group}: {name}", seed) for seed in options.seeds]
            try:
                is_base = jobs[0].spec.key == base_jobs[0].spec.key
            except UserError as error:
                variant.refused, jobs, is_base = str(error), [], False
            if not is_base:
                plans.append((variant, jobs))
    return plans


def _job(options: Options, entry: Entry, overrides: tuple[str, ...], name: str, seed: int) -> Train:
    parts = (BASE, SHAPES[entry.width].overrides, entry.arm.overrides, overrides, options.set)
    label = entry.label if name == "base" else f"{entry.label}, {name},"
    return Train(
        RunSpec.of(label, *parts, steps=options.steps, lr=entry.rate, seed=seed), eval_blocks=options.eval_blocks
    )
