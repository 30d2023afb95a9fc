"""Rules on a run config that need no model, data or ranks: ranges of fields, and combinations of fields."""

from __future__ import annotations

import math

from homodistil.config.option import Limits
from homodistil.config.schema import (
    LM_HEAD_WEIGHTS,
    OPTIONS,
    TASKS_OF_LABELS,
    TASKS_WITHOUT_LM_HEAD,
    RunConfig,
    value_of,
)
from homodistil.config.schema_loss import POOLED_WEIGHTS, SCORE_WEIGHTS
from homodistil.errors import UserError

MAX_EVENTS = 100_000
"""Maximum number of possible events, each of which has an entry in a table; no model has so many widths."""


def range_text(name: str) -> str:
    """The range of a field as text, such as "in (0, 10]"; "" if the field has no range."""
    limits = OPTIONS[name].limits
    return f"in {limits}" if limits else ""


def check(config: RunConfig) -> None:
    """Raise `UserError` for the first rule that `config` breaks."""
    for name, facts in OPTIONS.items():
        if facts.limits and value_of(config, name) is not None:
            _check_range(name, value_of(config, name), facts.limits)
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
    check_task(config)
    if not config.loss.weights:
        raise UserError("loss: every weight is 0; give at least one term a weight > 0")
    if 0 < config.train.lr_steps < config.train.steps:
        raise UserError(
            f"train.lr_steps: {config.train.lr_steps} is below train.steps {config.train.steps}, whose last steps "
            f"would have a rate of 0; allowed: 0, or {config.train.steps} and more"
        )
    check_schedule(config)
    _check_size(config)
    _check_vocabulary(config)
    _check_normalisation(config)
    _check_compensation(config)
    if config.loss.skip_first_tokens >= config.data.seq_len:
        raise UserError(
            f"loss.skip_first_tokens: found {config.loss.skip_first_tokens}, which leaves nothing of sequences of "
            f"{config.data.seq_len} tokens (data.seq_len); allowed is 0 .. {config.data.seq_len - 1}"
        )


def check_schedule(config: RunConfig) -> None:
    """What depends on how widths decrease. Of `auto` it is not known yet."""
    _check_num_events(config)
    _check_milestones(config)
    pruning = config.pruning
    if pruning.depth_schedule == "linear" and config.run.export_milestones:
        raise UserError(
            f"run.export_milestones: found {config.run.export_milestones}, allowed is [] with "
            f"pruning.depth_schedule=linear, whose layers leave at steps of their own; leave it empty, or set "
            f"pruning.depth_schedule=one_shot"
        )
    cuts_at_once = pruning.schedule in ("auto", "one_shot") or "one_shot" in config.run.compare
    if pruning.one_shot_stages > 1 and not (cuts_at_once and pruning.compensation != "none"):
        raise UserError(
            f"pruning.one_shot_stages: found {pruning.one_shot_stages}, allowed is 1 unless pruning.schedule is "
            f"one_shot (found {pruning.schedule}) and pruning.compensation refit, project or full (found "
            f"{pruning.compensation})"
        )


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


def check_task(config: RunConfig) -> None:
    """Nothing that needs a language-modelling head may be asked for where there is none."""
    _check_pooled(config)
    _check_scores(config)
    if config.data.task not in TASKS_WITHOUT_LM_HEAD:
        return
    for name in (*(name for name in LM_HEAD_WEIGHTS if name in config.given), "teacher.correction_steps"):
        if value_of(config, name) > 0:
            raise UserError(
                f"{name}: found {value_of(config, name):g}, but data.task={config.data.task} uses no "
                f"language-modelling head; allowed is 0, or set data.task=mlm for a teacher with such a head"
            )
    if config.pruning.importance == "teacher_kl":
        raise UserError(
            "pruning.importance: found teacher_kl, which draws labels from a language-modelling head, which "
            f"data.task={config.data.task} leaves out; set pruning.importance=sensitivity"
        )


def _check_pooled(config: RunConfig) -> None:
    """Vectors of texts need blocks that hold one text each."""
    used = [f"loss.{name}" for name in POOLED_WEIGHTS if getattr(config.loss, name) > 0]
    if used and config.data.task not in ("auto", "embedding"):
        raise UserError(
            f"{used[0]}: found {value_of(config, used[0]):g}, allowed with data.task={config.data.task} is 0, as its "
            f"blocks hold several texts; set data.task=embedding, or {used[0]}=0"
        )


def _check_scores(config: RunConfig) -> None:
    """Logits of labels need a head of labels, and pairs of texts a model that reads them."""
    data = config.data
    _check_pairs(data.pair_columns, data.prompt)
    used = [f"loss.{name}" for name in SCORE_WEIGHTS if getattr(config.loss, name) > 0]
    used += [name for name in ("loss.labels", "data.pair_columns", "data.label_column") if value_of(config, name)]
    if used and data.task not in ("auto", *TASKS_OF_LABELS):
        raise UserError(
            f"{used[0]}: found {value_of(config, used[0])}, but data.task={data.task} has no head of labels, as only "
            f"classifiers and cross-encoders have; set data.task=scores, or leave {used[0]} out"
        )
    if data.label_column in (data.pair_columns or [data.text_column]):
        raise UserError(
            f"data.label_column: found {data.label_column!r}, which is a column of texts; name the column of the labels"
        )
    if config.loss.labels > 0 and not data.label_column:
        raise UserError(
            f"loss.labels: found {config.loss.labels:g}, allowed without data.label_column is 0, as there are no "
            f"labels to learn; name their column in data.label_column, or set loss.labels=0"
        )
    if data.task in TASKS_OF_LABELS and config.pruning.importance == "activation":
        raise UserError(
            f"pruning.importance: found activation, which does not look at the head of labels of "
            f"data.task={data.task}; set pruning.importance=sensitivity"
        )


def _check_pairs(columns: list[str], prompt: str) -> None:
    if columns and (len(columns) != 2 or len(set(columns) - {""}) < 2):
        raise UserError(
            f"data.pair_columns: found {columns}, allowed are the names of two columns, such as [query,passage], or "
            f"nothing; name both"
        )
    if columns and prompt not in ("auto", "none"):
        raise UserError(
            f"data.prompt: found {prompt!r}, allowed with data.pair_columns is none; put it into the texts instead"
        )


def _check_milestones(config: RunConfig) -> None:
    run, schedule = config.run, config.pruning.schedule
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


def _check_size(config: RunConfig) -> None:
    """The student's size is said in one way."""
    student = config.student
    heads = ("num_attention_heads", "num_key_value_heads", "head_dim")
    sizes = ("hidden_size", "intermediate_size", *heads)
    ways = {f"student.{name}": getattr(student, name) for name in ("size", "parameters", *sizes)}
    if student.preset != "custom":
        ways["student.preset"] = student.preset
    given = [name for name, value in ways.items() if value is not None]
    if given and given[0] in ("student.size", "student.parameters") and len(given) > 1:
        raise UserError(
            f"{given[0]}: found {ways[given[0]]:g} beside {', '.join(given[1:])}; {given[0]} chooses all widths, so "
            f"give one or the other (student.num_hidden_layers may stand beside it)"
        )


def _check_vocabulary(config: RunConfig) -> None:
    vocab = config.student.vocab
    is_number = vocab.isascii() and vocab.isdigit() and len(vocab) < 10 and int(vocab) > 0
    if vocab not in ("all", "corpus") and not is_number:
        raise UserError(
            f"student.vocab: found {vocab[:40]!r}, allowed are all, corpus and a number of pieces in decimal digits; "
            f"set student.vocab=16000, say"
        )


def _check_normalisation(config: RunConfig) -> None:
    pruning = config.pruning
    if pruning.score_normalisation != "none" and pruning.importance in ("random", "activation"):
        raise UserError(
            f"pruning.score_normalisation: found {pruning.score_normalisation}, allowed with pruning.importance="
            f"{pruning.importance} is none, as these are no scores of weights; set it to none, or another importance"
        )


def _check_compensation(config: RunConfig) -> None:
    pruning, loss = config.pruning, config.loss
    has_projections = loss.hidden > 0 or loss.embedding > 0
    cuts = pruning.schedule != "none" or config.run.compare
    projects = cuts and pruning.compensation in ("auto", "project", "full")
    if projects and has_projections and not loss.projection_learned:
        raise UserError(
            "loss.projection_learned: found false, allowed with pruning.compensation=full or project is true: a "
            "projected residual stream has no selected dims that W could be; set it to true, or "
            "pruning.compensation=refit"
        )
    check_basis(config)


def check_basis(config: RunConfig) -> None:
    """A basis may be chosen only where there is a projection to choose it for."""
    pruning = config.pruning
    if pruning.basis != "auto" and pruning.compensation in ("none", "refit"):
        raise UserError(
            f"pruning.basis: found {pruning.basis}, allowed with pruning.compensation={pruning.compensation} is auto, "
            f"as nothing is projected there; set it to auto, or pruning.compensation=full or project"
        )


def _check_range(name: str, value: float | list[float] | dict[str, float], limits: Limits) -> None:
    if isinstance(value, dict):
        for key, number in value.items():
            _check_range(f"{name}.{key}", number, limits)
        return
    for number in value if isinstance(value, list) else [value]:
        if not limits.contain(number):
            raise UserError(f"{name}: found {number}, allowed {limits}; set a value in this range")
