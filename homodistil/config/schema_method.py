"""Sections of the run config about the method: train, pruning, optimizer. See `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from homodistil.config.option import (
    CALIBRATION,
    COMPUTED,
    COMPUTED_KEY,
    CONTROL,
    CORRECTION,
    COUNT,
    KEY,
    MEASUREMENT,
    MILESTONE,
    PLAIN_CONTROL,
    SAME,
    SAME_RATES,
    SEED,
    STEPS,
    TRIAL,
    WEIGHT,
    option,
)


@dataclass(kw_only=True)
class TrainConfig:
    """train: steps, batches, learning rate, intervals of logging and checkpoints"""

    steps: int = option(
        600,
        low=1,
        high=STEPS,
        resume="fixed",
        students="own",
        derived={CORRECTION: COMPUTED_KEY, MILESTONE: COMPUTED, MEASUREMENT: COMPUTED},
    )
    """Optimizer steps (>= 1)."""
    global_batch_size: int = option(
        32,
        low=1,
        high=COUNT,
        resume="fixed",
        students="shared",
        derived={CORRECTION: KEY, TRIAL: COMPUTED, CALIBRATION: COMPUTED},
    )
    """Sequences per optimizer step over all ranks; a multiple of micro_batch_size x ranks."""
    micro_batch_size: int = option(
        16, low=1, high=COUNT, resume="free", students="shared", derived={CALIBRATION: COMPUTED}
    )
    """Sequences that a rank processes at once; gradient accumulation makes up the global batch."""
    lr: float = option(
        3e-3, low=0, high=10, exclude="low", resume="fixed", students="own", derived={CORRECTION: COMPUTED_KEY}
    )
    """Peak learning rate (> 0): linear warm-up, then linear decay to 0 (decay_fraction). Unless it is set: by the width
    that the student ends with, .192 / hidden size; a quarter of it for decoders and heads of labels."""
    lr_steps: int = option(
        0,
        low=0,
        high=STEPS,
        resume="fixed",
        students="own",
        derived={CORRECTION: 0, MILESTONE: 0, SAME_RATES: COMPUTED, MEASUREMENT: 0},
    )
    """Steps over which the learning rate warms up and decays to 0 (0 = train.steps; at least train.steps)."""
    cool_from: list[int] = option(
        [],
        limited_by="nothing: a step behind the last one has no effect",
        resume="fixed",
        students="own",
        derived={CORRECTION: [], MILESTONE: [], SAME_RATES: COMPUTED, MEASUREMENT: []},
    )
    """Steps from which the learning rate falls linearly to 0 over cool_steps; then it returns to its schedule."""
    cool_steps: int = option(0, low=0, high=STEPS, resume="fixed", students="own", derived={SAME_RATES: COMPUTED})
    """Length in steps of each cool-down in cool_from (>= 0)."""
    rewarm_steps: int = option(0, low=0, high=STEPS, resume="fixed", students="own", derived=SAME)
    """Steps over which the learning rate is warmed up again after each resize event (0 = no re-warming)."""
    warmup_fraction: float = option(0.1, low=0, high=1, resume="fixed", students="own", derived={CORRECTION: KEY})
    """Fraction of steps for the warm-up, in [0, 1]."""
    decay_fraction: float = option(
        1.0, low=0, high=1, exclude="low", resume="fixed", students="own", derived={CORRECTION: 1.0}
    )
    """Fraction of steps at the end over which the learning rate falls to 0, in (0, 1]; before, it stays at its peak. 1:
    it falls from the end of the warm-up on."""
    uncut_lr_share: float = option(
        1.0, low=0, high=1, exclude="low", resume="fixed", students="own", derived={CORRECTION: 1.0}
    )
    """Share of the learning rate at the teacher's widths, in (0, 1]. With every event it comes nearer to 1, in
    proportion to how much of the cut has been made (the mean over all axes that are cut)."""
    weight_decay: float = option(0.01, low=0, high=100, resume="fixed", students="own", derived={CORRECTION: KEY})
    """Decoupled weight decay of matrices (>= 0); vectors and distillation projections have none."""
    gradient_clipping: float = option(
        1.0, low=0, high=WEIGHT, resume="fixed", students="own", derived={CORRECTION: KEY}
    )
    """Maximum global gradient norm (0 = no clipping)."""
    seed: int = option(0, low=0, high=SEED, resume="fixed", students="shared", derived={CORRECTION: COMPUTED_KEY})
    """Seed of data order, masking and initialisation (>= 0)."""
    save_every_steps: int = option(
        0, low=0, high=STEPS, resume="free", students="shared", derived={CORRECTION: 0, MEASUREMENT: 0}
    )
    """Steps between checkpoints (0 = only at the end)."""
    eval_every_steps: int = option(
        0, low=0, high=STEPS, resume="free", students="shared", derived={CORRECTION: 0, MEASUREMENT: 0}
    )
    """Steps between held-out evaluations (0 = only at the end)."""
    eval_batch_size: int = option(64, low=1, high=COUNT, resume="free", students="shared", derived=SAME)
    """Sequences that a rank evaluates at once."""
    log_every_steps: int = option(
        10, low=1, high=STEPS, resume="free", students="shared", derived={MEASUREMENT: COMPUTED, TRIAL: 1}
    )
    """Steps between lines of metrics.jsonl and TensorBoard (>= 1). Losses are read and checked only then."""


@dataclass(kw_only=True)
class PruningConfig:
    """pruning: when neurons are removed, and which"""

    schedule: Literal["auto", "cubic", "linear", "one_shot", "gap", "none"] = option(
        "auto", resume="fixed", students="own", derived={CONTROL: "one_shot", MEASUREMENT: COMPUTED}
    )
    """How widths decrease: cubic (the paper), linear, one_shot (all at step 0), gap (as fast as gap_bound allows), none
    (widths do not change). auto: one_shot where cuts are compensated, as no gradual schedule was ahead there; cubic
    where they are not, and where start_fraction, end_fraction, interval_steps, max_event_fraction or
    run.export_milestones is set, or run.compare has one_shot; none with student.init=random."""
    depth_schedule: Literal["one_shot", "linear"] = option(
        "one_shot", resume="fixed", students="own", derived={CONTROL: "one_shot", MEASUREMENT: "one_shot"}
    )
    """When the layers leave that student.num_hidden_layers does not keep. one_shot: before step 1; linear: one at a
    time, evenly from start_fraction to end_fraction, each time the one of least block influence among those that may
    (docs/depth.md)."""
    start_fraction: float = option(0.0, low=0, high=1, resume="fixed", students="own", derived={MEASUREMENT: 0.0})
    """Start of pruning (t_i in the paper) as a fraction of train.steps, in [0, 1]."""
    end_fraction: float = option(0.1, low=0, high=1, resume="fixed", students="own", derived={MEASUREMENT: COMPUTED})
    """End of pruning (t_f) as a fraction of train.steps, in [0, 1], >= start_fraction (paper: 0.5, 0.7 or 0.9)."""
    interval_steps: int = option(5, low=1, high=STEPS, resume="fixed", students="own", derived={MEASUREMENT: COMPUTED})
    """Steps between resize events (>= 1)."""
    width_multiple: int = option(1, low=1, high=COUNT, resume="fixed", students="own", derived=SAME)
    """Intermediate widths of the residual stream are multiples of this (>= 1; 64 suits tensor cores)."""
    ffn_multiple: int = option(8, low=1, high=COUNT, resume="fixed", students="own", derived=SAME)
    """Intermediate feed-forward widths are multiples of this (>= 1)."""
    head_dim_multiple: int = option(1, low=1, high=COUNT, resume="fixed", students="own", derived=SAME)
    """Intermediate head sizes are multiples of this (>= 1)."""
    max_event_fraction: float = option(
        0.5, low=0, high=1, exclude="low", resume="fixed", students="own", derived={MEASUREMENT: 1.0}
    )
    """Largest share of an axis that one event may remove, in (0, 1]. one_shot ignores it."""
    gap_bound: float = option(0.1, low=0, high=1000, exclude="low", resume="fixed", students="own", derived=SAME)
    """schedule=gap: largest rise of the KL to the teacher (nats, on the probe) that one event may cause (> 0)."""
    gap_recovery: float = option(0.5, low=0, high=1, resume="fixed", students="own", derived=SAME)
    """schedule=gap: share of the KL rise of the last event that training must recover before the next event, in [0, 1].
    It is not waited for while pruning is behind a straight line to the target."""
    importance: Literal["sensitivity", "magnitude", "random", "platon", "teacher_kl", "activation"] = option(
        "sensitivity", resume="fixed", students="own", derived=SAME
    )
    """Importance of a neuron, summed over its weights. sensitivity: |theta * gradient| (the paper); magnitude: |theta|;
    random; platon: sensitivity x uncertainty (PLATON); teacher_kl: |theta * gradient| of the cross-entropy to labels
    sampled from the teacher. Or activation: size of its activations, without gradients (Minitron)."""
    score_normalisation: Literal["none", "per_tensor"] = option("none", resume="fixed", students="own", derived=SAME)
    """Before the scores of weights are summed over a neuron's parameters: none, or per_tensor: scores of each parameter
    (a bias with its weight) are divided by their sum, so that none has more say than another."""
    ema_beta: float = option(0.85, low=0, high=1, exclude="high", resume="fixed", students="own", derived=SAME)
    """Decay of the moving average of the scores over steps, in [0, 1)."""
    uncertainty_beta: float = option(0.95, low=0, high=1, exclude="high", resume="fixed", students="own", derived=SAME)
    """Decay of the moving average of PLATON's uncertainty, in [0, 1)."""
    calibration_batches: int = option(10, low=1, high=COUNT, resume="fixed", students="own", derived={TRIAL: 1})
    """Global batches over which importance is measured before step 0 by one_shot, and before each event by
    importance=teacher_kl and activation (>= 1)."""
    protect_outliers: float = option(0.1, low=0, high=1, resume="fixed", students="own", derived=SAME)
    """Residual dims with more than this share of the variance at any LayerNorm stay (0 = protect none)."""
    compensation: Literal["auto", "none", "refit", "project", "full"] = option(
        "auto", resume="fixed", students="own", derived={PLAIN_CONTROL: "none", MEASUREMENT: "none"}
    )
    """What a cut does about what it takes away: none (the paper), refit (least squares of what remains), full (rotated
    heads and a projected residual stream, then refit), project (as full, but only norms and the vocabulary head are
    refitted). auto: full; refit where there is neither a head nor vectors of texts; none where the teacher's family has
    no compensation, and for embedders that only lose layers. What leaving layers did is refitted, too (docs/depth.md).
    Without effect where nothing is cut."""
    compensation_sequences: int = option(
        128, low=1, high=COUNT, resume="fixed", students="own", derived={TRIAL: COMPUTED}
    )
    """Training sequences over all ranks for the statistics of an event (>= 1). Unless it is set, 512 where all is cut
    at once (one_shot), and for tasks embedding and scores."""
    compensation_ridge: float | None = option(
        1e-2, low=0, high=WEIGHT, exclude="low", resume="fixed", students="own", derived=SAME
    )
    """Ridge of the refit, as a share of the mean variance of its inputs (> 0; far below 1e-4 the rounding of fp32
    products counts). null, which decoders have unless it is set: chosen for each linear from .001 to 1, by a quarter of
    the rows held out."""
    basis: Literal["auto", "fisher", "pca", "learned"] = option(
        "auto", resume="fixed", students="own", derived={PLAIN_CONTROL: "auto", MEASUREMENT: "auto"}
    )
    """full, project: what the subspace of the residual stream is chosen by. pca: its activations and the decoder's
    rows; fisher: the gradients of a head, or of the vectors of texts, too; learned: begun like auto, then trained so
    that the cut network stays near the present one (KL of the language-modelling head, without one the error of the
    last hidden states). auto: fisher; pca where there is neither."""
    basis_steps: int = option(60, low=1, high=STEPS, resume="fixed", students="own", derived={TRIAL: 1})
    """basis=learned: steps of training the basis in every event that narrows the residual stream (>= 1), each on one
    micro-batch per rank; schedule=gap trains one for every cut that it tries."""
    basis_lr: float = option(0.05, low=0, high=1, exclude="low", resume="fixed", students="own", derived=SAME)
    """basis=learned: angle (radians) by which directions of the basis turn in the first of these steps (> 0); it falls
    linearly to 0."""
    compensation_limit: float = option(0.25, low=0, high=1000, resume="fixed", students="own", derived=SAME)
    """full, project: largest rise of the held-out loss (nats) that a rotation alone may cause at full width, measured
    at start where blocks end with a LayerNorm (without a head: largest share of the hidden states' variance that it may
    lose; of an embedder: largest mean 1 - cosine of its vectors; of a head of labels: largest KL of these, or share of
    the variance of its scores). Above it, the residual dims protected by protect_outliers are not rotated. If the rise
    is still too large, nothing is rotated, events are compensated as with refit, and the run reports it."""
    one_shot_stages: int = option(
        1, low=1, high=1000, resume="fixed", students="own", derived={PLAIN_CONTROL: 1, TRIAL: 1}
    )
    """one_shot with compensation: number of stages of equal ratio in which the cut is made (>= 1)."""
    carry_moments: bool = option(True, resume="fixed", students="own", derived=SAME)
    """Keep Adam's moments of the remaining entries at an event; false: reset all moments to 0 (for comparisons)."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """optimizer: AdamW"""

    implementation: Literal["torch_fused", "deepspeed_fused", "apex_fused"] = option(
        "torch_fused", resume="free", students="own", derived={CORRECTION: KEY}
    )
    """AdamW from torch (fused), DeepSpeed's ops (built on first use) or NVIDIA apex (recognised by its files)."""
    beta1: float = option(0.9, low=0, high=1, exclude="high", resume="fixed", students="own", derived={CORRECTION: KEY})
    """Adam's beta1, in [0, 1)."""
    beta2: float = option(
        0.999, low=0, high=1, exclude="high", resume="fixed", students="own", derived={CORRECTION: KEY}
    )
    """Adam's beta2, in [0, 1)."""
    eps: float = option(1e-6, low=0, high=1, exclude="low", resume="fixed", students="own", derived={CORRECTION: KEY})
    """Adam's epsilon (> 0)."""
