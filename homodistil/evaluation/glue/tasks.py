"""The nine GLUE tasks as one table: columns of the official TSV files, labels, metrics. Read by all of this package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from homodistil.errors import UserError, nearest

MAX_SIMILARITY = 5.0
"""STS-B's scores lie between 0 and this."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task. Layout: https://gluebenchmark.com (glue_data/TITLE/*.tsv); hub: nyu-mll/glue."""

    name: str
    """Name on the command line and in the hub's repository."""
    title: str
    """Name in the papers, and of the folder."""
    texts: tuple[str, ...]
    """Columns of the sentence or of both sentences."""
    label: str = "label"
    """Column of the label."""
    labels: Mapping[str, str] | None
    """The file's spelling -> name; the order gives the class numbers. None: a similarity between 0 and 5."""
    metrics: tuple[str, ...]
    """Names in metrics.METRICS; the score of the task is their mean."""
    dev: Mapping[str, str] = field(default_factory=lambda: {"": "dev.tsv"})
    """Suffix of the metrics -> file. The first one decides early stopping and the choice of a setting."""
    columns: tuple[str, ...] | None = None
    """All columns of files without a header line."""
    hub_texts: tuple[str, ...] | None = None
    """Where the hub's columns have other names than the files'."""
    drops_broken_rows: bool = False
    """The official files have rows with missing fields, which everybody leaves out."""

    @property
    def is_regression(self) -> bool:
        return self.labels is None

    @property
    def result_names(self) -> tuple[str, ...]:
        """Every metric that a run reports, such as accuracy_m and accuracy_mm."""
        return tuple(metric_name(metric, suffix) for suffix in self.dev for metric in self.metrics)


def metric_name(metric: str, suffix: str) -> str:
    """`accuracy` on dev set `m` is accuracy_m; tasks with one dev set have the bare name."""
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
"""Not a GLUE task: the packaged stand-in for SST-2, whose source text it has, with other labels and another split."""


def find_task(name: str) -> Task:
    """Raises `UserError` for a name that is none of the nine nor `movie`."""
    known = {**TASKS, MOVIE.name: MOVIE}
    if name not in known:
        raise UserError(f"--tasks: found {name!r}, allowed: all, {', '.join(known)}{nearest(name, known)}")
    return known[name]
