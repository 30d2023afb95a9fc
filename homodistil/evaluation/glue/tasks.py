"""The nine GLUE tasks as one table: columns of the official TSV files, labels and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from homodistil.errors import UserError, nearest

MAX_SIMILARITY = 5.0
"""Scores of STS-B are between 0 and this."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task, in the layout of https://gluebenchmark.com (glue_data/TITLE/*.tsv) and nyu-mll/glue on the hub."""

    name: str
    """Name on the command line and on the hub."""
    title: str
    """Name in papers, and of the folder."""
    texts: tuple[str, ...]
    """Columns of the sentence or of both sentences."""
    label: str = "label"
    """Column of the label."""
    labels: Mapping[str, str] | None
    """Label in the file -> name, in the order of the class numbers. None: a similarity between 0 and 5."""
    metrics: tuple[str, ...]
    """Names in metrics.METRICS; the score of the task is their mean."""
    dev: Mapping[str, str] = field(default_factory=lambda: {"": "dev.tsv"})
    """Suffix of the metrics -> file. The first one is used for early stopping and to choose the best setting."""
    columns: tuple[str, ...] | None = None
    """All columns of files without a header line."""
    hub_texts: tuple[str, ...] | None = None
    """Columns of the texts on the hub, if they have other names than in the files."""
    drops_broken_rows: bool = False
    """Whether to leave out rows with missing fields, which the official files have."""

    @property
    def is_regression(self) -> bool:
        return self.labels is None

    @property
    def result_names(self) -> tuple[str, ...]:
        """Names of all metrics that a run reports, such as accuracy_m and accuracy_mm."""
        return tuple(metric_name(metric, suffix) for suffix in self.dev for metric in self.metrics)


def metric_name(metric: str, suffix: str) -> str:
    """Name of a metric on one dev set: "accuracy_m" for the suffix "m", "accuracy" for the suffix ""."""
    return f"{metric}_{suffix}" if suffix else metric


_ENTAILMENT = {"entailment": "entailment", "not_entailment": "not_entailment"}
_PAIR = ("sentence1", "sentence2")

_NINE = (
    Task(
        name="cola",
        title="CoLA",
        texts=("sentence",),
        labels={"0": "unacceptable", "1": "acceptable"},
        metrics=("matthews",),
        columns=("source", "label", "mark", "sentence"),
    ),
    Task(
        name="sst2",
        title="SST-2",
        texts=("sentence",),
        labels={"0": "negative", "1": "positive"},
        metrics=("accuracy",),
    ),
    Task(
        name="mrpc",
        title="MRPC",
        texts=("#1 String", "#2 String"),
        hub_texts=_PAIR,
        label="Quality",
        labels={"0": "not_equivalent", "1": "equivalent"},
        metrics=("f1", "accuracy"),
    ),
    Task(name="stsb", title="STS-B", texts=_PAIR, label="score", labels=None, metrics=("pearson", "spearman")),
    Task(
        name="qqp",
        title="QQP",
        texts=("question1", "question2"),
        label="is_duplicate",
        labels={"0": "not_duplicate", "1": "duplicate"},
        metrics=("f1", "accuracy"),
        drops_broken_rows=True,
    ),
    Task(
        name="mnli",
        title="MNLI",
        texts=_PAIR,
        hub_texts=("premise", "hypothesis"),
        label="gold_label",
        labels={name: name for name in ("entailment", "neutral", "contradiction")},
        metrics=("accuracy",),
        dev={"m": "dev_matched.tsv", "mm": "dev_mismatched.tsv"},
    ),
    Task(name="qnli", title="QNLI", texts=("question", "sentence"), labels=_ENTAILMENT, metrics=("accuracy",)),
    Task(name="rte", title="RTE", texts=_PAIR, labels=_ENTAILMENT, metrics=("accuracy",)),
    Task(
        name="wnli",
        title="WNLI",
        texts=_PAIR,
        labels={"0": "not_entailment", "1": "entailment"},
        metrics=("accuracy",),
    ),
)
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _NINE})

MOVIE = replace(TASKS["sst2"], name="movie", title="Movie sentences")
"""A packaged substitute for SST-2, not a GLUE task: the same source text with other labels and another split."""


def find_task(name: str) -> Task:
    """The task of this name, one of the nine or "movie". Raises `UserError` for other names."""
    known = {**TASKS, MOVIE.name: MOVIE}
    if name not in known:
        raise UserError(f"--tasks: found {name!r}, allowed: all, {', '.join(known)}{nearest(name, known)}")
    return known[name]
