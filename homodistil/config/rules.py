"""Rules on the values of a run config that need no model, data or ranks: ranges, and what fields must say together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from homodistil.errors import UserError

if TYPE_CHECKING:
    from homodistil.config.schema import RunConfig

# Upper bounds are far above what makes sense, and below what overflows, runs for ever or fills a machine's memory.
_STEPS = 10**9
"""A step a millisecond would take 11 days; tables of schedules are as long as events, not as steps."""
_COUNT = 10**7
"""Sequences, batches, neurons: more fit no machine."""
_WEIGHT = 10**6
"""Of a loss term: fp32 still adds a term a million times smaller to about one."""
_SECONDS = 10**7
"""115 days, and below what waiting in a thread takes."""
MAX_EVENTS = 100_000
"""Steps at which a width may be due: each has an entry in a table. No model has so many widths to pass."""
# (field, smallest, largest, which ends are excluded: "", "low", "high", "both")
_INF = float("inf")
_RANGES = [
    ("teacher.correction_steps", 0, _STEPS, ""),
    ("teacher.correction_lr", 0, 10, "low"),
    ("teacher.correction_seed", 0, 2**31 - 1, ""),
    ("student.dropout", 0, 1, "high"),
    ("data.seq_len", 3, 2**20, ""),
    ("data.heldout_fraction", 0, 1, "both"),
    ("data.mask_probability", 1e-4, 1, "high"),
    ("data.workers", 0, 4096, ""),
    ("data.shard_bytes", 1, 2**50, ""),
    ("train.steps", 1, _STEPS, ""),
    ("train.global_batch_size", 1, _COUNT, ""),
    ("train.micro_batch_size", 1, _COUNT, ""),
    ("train.lr", 0, 10, "low"),
    ("train.lr_steps", 0, _STEPS, ""),
    ("train.cool_steps", 0, _STEPS, ""),
    ("train.rewarm_steps", 0, _STEPS, ""),
    ("train.warmup_fraction", 0, 1, ""),
    ("train.weight_decay", 0, 100, ""),
    ("train.gradient_clipping", 0, _WEIGHT, ""),
    ("train.seed", 0, 2**31 - 1, ""),
    ("train.save_every_steps", 0, _STEPS, ""),
    ("train.eval_every_steps", 0, _STEPS, ""),
    ("train.eval_batch_size", 1, _COUNT, ""),
    ("train.log_every_steps", 1, _STEPS, ""),
    ("pruning.start_fraction", 0, 1, ""),
    ("pruning.end_fraction", 0, 1, ""),
    ("pruning.interval_steps", 1, _STEPS, ""),
    ("pruning.width_multiple", 1, _COUNT, ""),
    ("pruning.ffn_multiple", 1, _COUNT, ""),
    ("pruning.head_dim_multiple", 1, _COUNT, ""),
    ("pruning.max_event_fraction", 0, 1, "low"),
    ("pruning.ema_beta", 0, 1, "high"),
    ("pruning.uncertainty_beta", 0, 1, "high"),
    ("pruning.calibration_batches", 1, _COUNT, ""),
    ("pruning.protect_outliers", 0, 1, ""),
    ("pruning.gap_bound", 0, 1000, "low"),
    ("pruning.gap_recovery", 0, 1, ""),
    ("pruning.compensation_sequences", 1, _COUNT, ""),
    ("pruning.compensation_ridge", 0, _WEIGHT, "low"),
    ("pruning.compensation_limit", 0, 1000, ""),
    ("pruning.one_shot_stages", 1, 1000, ""),
    ("loss.mlm", 0, _WEIGHT, ""),
    ("loss.kl", 0, _WEIGHT, ""),
    ("loss.hidden", 0, _WEIGHT, ""),
    ("loss.attention", 0, _WEIGHT, ""),
    ("loss.embedding", 0, _WEIGHT, ""),
    ("loss.cosine", 0, _WEIGHT, ""),
    ("loss.relations", 0, _WEIGHT, ""),
    ("loss.relation_heads", 0, _COUNT, ""),
    ("loss.kl_temperature", 0, 1000, "low"),
    ("optimizer.beta1", 0, 1, "high"),
    ("optimizer.beta2", 0, 1, "high"),
    ("optimizer.eps", 0, 1, "low"),
    ("run.settle_steps", 0, _STEPS, ""),
    ("run.keep_checkpoints", 1, _COUNT, ""),
    ("run.rank_timeout_s", 0, _SECONDS, "low"),
]


def range_text(name: str) -> str:
    """Which values a number of this field may have, such as "in (0, 10]"; "" where nothing is said."""
    return next((f"in {_interval(*limits)}" for field, *limits in _RANGES if field == name), "")


def check_rules(config: RunConfig) -> None:
    """Raises `UserError` at the first rule that `config` breaks."""
    for name, low, high, open_ends in _RANGES:
        _check_range(name, _get(config, name), low, high, open_ends)
    if config.pruning.end_fraction < config.pruning.start_fraction:
        raise UserError(
            f"pruning.end_fraction: {config.pruning.end_fraction} is before pruning.start_fraction "
            f"{config.pruning.start_fraction}; set end_fraction >= start_fraction"
        )
    if not config.data.sources:
        raise UserError("data.sources: found an empty list; name at least one file, folder, data set or embedded")
    if not config.data.text_column.strip():
        raise UserError("data.text_column: found nothing, allowed is the name of a column; set data.text_column=text")
    _check_weights(config)
    for name, weight in config.loss.extra.items():
        _check_range(f"loss.extra.{name}", weight, 0, _WEIGHT, "")
    if not config.loss.weights:
        raise UserError("loss: every weight is 0; give at least one term a weight > 0")
    if 0 < config.train.lr_steps < config.train.steps:
        raise UserError(
            f"train.lr_steps: {config.train.lr_steps} is below train.steps {config.train.steps}, whose last steps "
            f"would have a rate of 0; allowed: 0, or {config.train.steps} and more"
        )
    _check_num_events(config)
    _check_milestones(config)
    _check_compensation(config)


def _check_num_events(config: RunConfig) -> None:
    pruning, steps = config.pruning, config.train.steps
    times = (pruning.end_fraction - pruning.start_fraction) * steps / pruning.interval_steps
    if pruning.schedule in ("cubic", "linear", "gap") and times > MAX_EVENTS:
        enough = math.ceil(times * pruning.interval_steps / MAX_EVENTS)
        raise UserError(
            f"pruning.interval_steps: found {pruning.interval_steps}, which makes {times:.0f} possible events in "
            f"{steps} steps, allowed are {MAX_EVENTS}; set pruning.interval_steps={enough} or more"
        )


def _check_weights(config: RunConfig) -> None:
    weights, sources = config.data.weights, config.data.sources
    if weights and len(weights) != len(sources):
        raise UserError(
            f"data.weights: found {len(weights)} for {len(sources)} data.sources; give one for each source, or none"
        )
    for weight in weights:
        _check_range("data.weights", weight, 0, 1000, "low")


def _check_milestones(config: RunConfig) -> None:
    run, schedule = config.run, config.pruning.schedule
    for fraction in run.export_milestones:
        _check_range("run.export_milestones", fraction, 0, 1, "both")
    if run.export_milestones and schedule in ("one_shot", "none"):
        raise UserError(
            f"run.export_milestones: found {run.export_milestones}, but with pruning.schedule={schedule} the width "
            f"passes nothing while it is trained; set pruning.schedule to cubic, linear or gap, or leave them out"
        )
    if run.settle_steps and not run.export_milestones:
        raise UserError(
            f"run.settle_steps: found {run.settle_steps}, but there is nothing to settle at; allowed is 0, or set "
            f"run.export_milestones=[0.75,0.5], say"
        )


def _check_compensation(config: RunConfig) -> None:
    pruning, loss = config.pruning, config.loss
    cuts_at_once = pruning.schedule == "one_shot" or "one_shot" in config.run.compare
    if pruning.one_shot_stages > 1 and not (cuts_at_once and pruning.compensation != "none"):
        raise UserError(
            f"pruning.one_shot_stages: found {pruning.one_shot_stages}, allowed is 1 unless pruning.schedule is "
            f"one_shot (found {pruning.schedule}) and pruning.compensation refit or full (found "
            f"{pruning.compensation})"
        )
    has_projections = loss.hidden > 0 or loss.embedding > 0
    projects = pruning.compensation == "full" and (pruning.schedule != "none" or config.run.compare)
    if projects and has_projections and not loss.projection_learned:
        raise UserError(
            "loss.projection_learned: found false, allowed with pruning.compensation=full is true: a projected "
            "residual stream has no selected dims that W could be; set it to true, or pruning.compensation=refit"
        )


def _get(config: RunConfig, dotted: str):
    section, name = dotted.split(".")
    return getattr(getattr(config, section), name)


def _check_range(name: str, value: float, low: float, high: float, open_ends: str) -> None:
    above = value > low if open_ends in ("low", "both") else value >= low
    below = value < high if open_ends in ("high", "both") else value <= high
    if not (above and below):
        raise UserError(f"{name}: found {value}, allowed {_interval(low, high, open_ends)}; set a value in this range")


def _interval(low: float, high: float, open_ends: str) -> str:
    left = "(" if open_ends in ("low", "both") else "["
    right = ")" if open_ends in ("high", "both") or high == _INF else "]"
    return f"{left}{low:.10g}, {high:.10g}{right}"
