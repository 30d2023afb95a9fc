"""Which methods are compared: every arm is a list of overrides of the run config, and nothing else.

BASE pins whatever the comparison depends on, so that a change of the product's defaults changes no arm.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.quality.specs import Shape

PINNED = (
    "student.dropout=0",
    "train.warmup_fraction=0.1",
    "train.weight_decay=0.01",
    "train.save_every_steps=0",
    "train.eval_every_steps=0",
    "pruning.schedule=cubic",
    "pruning.start_fraction=0",
    "pruning.width_multiple=1",
    "pruning.importance=sensitivity",
    "pruning.ema_beta=0.85",
    "pruning.protect_outliers=0.1",
    "pruning.compensation=none",
    "pruning.compensation_sequences=128",
    "loss.mlm=1",
    "loss.kl_temperature=1",
    "loss.kl_positions=masked",
    "run.compare=[]",
    "run.keep_checkpoints=1",
)
"""Of every study."""

BASE = (
    "recipe=quickstart",
    *PINNED,
    "train.global_batch_size=32",
    "train.micro_batch_size=32",
    "pruning.end_fraction=0.3",
    "pruning.interval_steps=10",
    "pruning.max_event_fraction=0.25",
    "loss.kl=1",
    "loss.hidden=1",
    "loss.attention=1",
    "loss.embedding=1",
    "loss.attention_target=scores",
    "loss.projection=student",
    "loss.projection_learned=true",
)

SHAPES = {
    "0.7": Shape(92, 368, 2),
    "half": Shape(64, 256, 2),
    "quarter": Shape(32, 128, 2),
    "eighth": Shape(16, 64, 2),
}
"""Target sizes, cut from the embedded BERT-tiny (2 layers, hidden 128, feed-forward 512, 2 heads). 0.7: of its
parameters; half of the width is .48 of them."""

RANDOM = ("student.init=random", "pruning.schedule=none")
NO_TERMS = ("loss.kl=0", "loss.hidden=0", "loss.attention=0", "loss.embedding=0")
DISTILBERT = (*NO_TERMS, "loss.mlm=2", "loss.kl=5", "loss.kl_temperature=2", "loss.cosine=1")
ONE_SHOT = ("pruning.schedule=one_shot",)
EARLY = ("pruning.end_fraction=0.1", "pruning.interval_steps=5", "pruning.max_event_fraction=0.5")
"""Gradual, but over soon; closed-form events may take more at once, and each costs some steps."""
FULL = ("pruning.compensation=full",)
OUR_WEIGHTS = ("loss.kl=4",)
"""Of the losses, as the quickstart has them; whoever trains with our losses gets the same."""


UNTRAINED_RATE = 1e-9
"""Learning rate of the only step of a student that is not to be trained (a run has one step at least)."""


@dataclass(frozen=True)
class Arm:
    name: str
    label: str
    """How the table calls it."""
    overrides: tuple[str, ...]
    is_ours: bool = False
    """A form of our own method: a verdict against it says nothing about rivals."""
    own_shape: bool = False
    """Has a size of its own, so it is trained once, not once a width."""
    rate: float = 6e-3
    """About its best learning rate at half width: the grid lies around it. From earlier runs: a grid that begins
    elsewhere ends at the same rate, but has to be extended."""
    recipe: str | None = None
    """Shipped recipe whose losses these are, but for what `note` says."""
    is_extra: bool = False
    """Trained only where it is named."""
    is_untrained: bool = False
    """Judged as it is cut: one step at UNTRAINED_RATE, which moves nothing."""
    note: str = ""


ARMS = {
    arm.name: arm
    for arm in (
        Arm(
            "ours_default",
            "ours, the default: one-shot, compensated, fitted to 512 sequences",
            (*ONE_SHOT, *FULL, *OUR_WEIGHTS, "pruning.compensation_sequences=512"),
            is_ours=True,
            rate=3e-3,
        ),
        Arm("ours_gradual", "ours, gradual, compensated", (*FULL, *EARLY, *OUR_WEIGHTS), is_ours=True, rate=3e-3),
        Arm("ours_one_shot", "ours, one-shot, compensated", (*ONE_SHOT, *FULL, *OUR_WEIGHTS), is_ours=True, rate=3e-3),
        Arm(
            "equal_weights",
            "ours, gradual, compensated, all losses with weight 1",
            (*FULL, *EARLY),
            is_ours=True,
            rate=3e-3,
            is_extra=True,
        ),
        Arm("homodistil", "HomoDistil (gradual, selection, t_f = .3), same losses", OUR_WEIGHTS),
        Arm(
            "paper",
            "HomoDistil (recipe=paper: t_f = .7)",
            (
                "pruning.end_fraction=0.7",
                "pruning.max_event_fraction=1",
                "pruning.protect_outliers=0",
                "loss.projection=teacher",
            ),
            recipe="paper",
            is_extra=True,
        ),
        Arm("one_shot", "one-shot (selection), same losses", (*ONE_SHOT, *OUR_WEIGHTS), recipe="baselines/one_shot"),
        Arm(
            "distilbert",
            "DistilBERT's losses",
            (*RANDOM, *DISTILBERT),
            rate=3e-3,
            recipe="baselines/distilbert",
            note="student of the target size, so it starts at random: its published start needs the teacher's width; "
            "KL on the masked rows (its code has that as an option; all rows would take several times as long)",
        ),
        Arm(
            "distilbert_layers",
            "DistilBERT as published",
            ("student.preset=teacher", "student.num_hidden_layers=1", "pruning.schedule=none", *DISTILBERT),
            own_shape=True,
            rate=3e-3,
            recipe="baselines/distilbert",
            note="half the layers at the teacher's width: another parameter count; KL on the masked rows",
        ),
        Arm(
            "tinybert",
            "TinyBERT + MLM",
            (*RANDOM, "loss.kl=0"),
            rate=1.2e-2,
            recipe="baselines/tinybert",
            note="general distillation; MLM added (weight 1), it has no MLM head otherwise",
        ),
        Arm(
            "minilmv2",
            "MiniLMv2 + MLM",
            (*RANDOM, *NO_TERMS, "loss.relations=1", "loss.relation_heads=8"),
            recipe="baselines/minilmv2",
            note="relations of the last layer; MLM added (weight 1), it has no MLM head otherwise",
        ),
        Arm(
            "random_init",
            "random init, our losses",
            (*RANDOM, *OUR_WEIGHTS),
            rate=1.2e-2,
            recipe="baselines/random_init",
        ),
        Arm("mlm_only", "random init, MLM only", RANDOM + NO_TERMS, rate=3e-3, recipe="baselines/mlm_only"),
    )
}
DEFAULT_ARM = "ours_default"
"""Whose superiority the verdicts are about: the form of our method that the product does by default."""
ABLATED_ARM = "equal_weights"
"""What ablations vary unless told otherwise: the default before its weights were chosen, so that they are seen, too."""
