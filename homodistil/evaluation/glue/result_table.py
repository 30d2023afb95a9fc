"""The result table of finished runs: per task the best setting with median and spread; then published rows."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from homodistil.evaluation.glue.grid import Record, write_output
from homodistil.evaluation.glue.published import ROWS
from homodistil.evaluation.glue.tasks import MOVIE, TASKS, Task, find_task
from homodistil.files import to_json

MARKDOWN_FILE = "glue.md"
JSON_FILE = "glue.json"
_SETTING = ("lr", "batch_size", "epochs")
_HEADINGS = {"matthews": "MCC", "f1": "F1", "accuracy": "acc", "pearson": "Pearson", "spearman": "Spearman"}


def summarise(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """Task name -> summary of its best setting, and of all settings.

    The value of a metric for a setting is the median over its seeds. The best setting has the highest median `score`;
    of equal ones, the first in the order of lr, batch size and epochs.

    Returns:
        {"best": summary, "settings": [summary, ...]} with summary = {lr, batch_size, epochs, seeds, score,
        metrics: {name: {median, standard_deviation (of the sample; None for one seed), min, max}}}.
    """
    groups: dict[str, dict[tuple, list[Record]]] = {}
    for record in records:
        key = tuple(record["setting"][name] for name in _SETTING)
        groups.setdefault(record["task"], {}).setdefault(key, []).append(record)
    result = {}
    for name in [name for name in (*TASKS, MOVIE.name) if name in groups]:
        settings = [_summary(find_task(name), key, groups[name][key]) for key in sorted(groups[name])]
        result[name] = {"best": max(settings, key=lambda summary: summary["score"]), "settings": settings}
    return result


def _summary(task: Task, key: tuple, records: list[Record]) -> dict[str, Any]:
    results = [record["result"] for record in records]
    return {
        **dict(zip(_SETTING, key, strict=True)),
        "seeds": sorted(record["setting"]["seed"] for record in records),
        "score": statistics.median(result["score"] for result in results),
        "metrics": {name: _spread([result[name] for result in results]) for name in task.result_names},
    }


def _spread(values: list[float]) -> dict[str, float | None]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {
        "median": statistics.median(values),
        "standard_deviation": deviation,
        "min": min(values),
        "max": max(values),
    }


def write_table(records: list[Record], out: Path) -> str:
    """Write glue.json and glue.md into `out`, atomically. Returns the Markdown."""
    summary = summarise(records)
    head = {"checkpoint": records[-1]["checkpoint"], "parameters": records[-1]["result"]["parameters"]}
    rows = [dataclasses.asdict(row) for row in ROWS]
    text = _markdown(head, summary)
    write_output(out / JSON_FILE, to_json({**head, "tasks": summary, "published": rows}) + "\n")
    write_output(out / MARKDOWN_FILE, text)
    return text


def _markdown(head: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    tasks = [*TASKS.values(), *([MOVIE] if MOVIE.name in summary else [])]
    lines = ["# GLUE, dev sets (percent)", ""]
    lines += _comparison(head, summary, tasks)
    lines += [
        "",
        "Measured here: the setting with the best median score on dev, median over its seeds +- their standard "
        "deviation; '-' is not measured or not published. A median chosen on dev is an optimistic one. "
        "Published rows: as their source counts (MRPC and QQP: F1 in some, accuracy in others; MNLI: matched).",
        "",
        "## Settings",
        "",
    ]
    return "\n".join([*lines, *_settings(summary), ""])


def _comparison(head: Mapping[str, Any], summary: Mapping[str, Any], tasks: list[Task]) -> list[str]:
    headings = [f"{task.title} {' / '.join(_heading(name) for name in task.result_names)}" for task in tasks]
    measured = [_measured(task, summary.get(task.name)) for task in tasks]
    lines = [["model", "parameters, M", *headings, "source"]]
    lines.append([_plain(head["checkpoint"]), f"{head['parameters'] / 1e6:.1f}", *measured, "measured here"])
    for row in ROWS:
        scores = [f"{row.scores[t.name]:.1f}" if t.name in row.scores else "-" for t in tasks]
        lines.append([row.model, f"{row.millions:g}", *scores, row.source])
    return _table(lines)


def _settings(summary: Mapping[str, Any]) -> list[str]:
    lines = [["task", "lr", "batch", "epochs", "seeds", "metric", "median", "min", "max", "standard deviation", "best"]]
    for name, task in summary.items():
        for setting in task["settings"]:
            place = [find_task(name).title, f"{setting['lr']:g}", str(setting["batch_size"]), str(setting["epochs"])]
            best = "best" if setting is task["best"] else ""
            for metric, spread in setting["metrics"].items():
                numbers = [_percent(spread[key]) for key in ("median", "min", "max", "standard_deviation")]
                lines.append([*place, str(len(setting["seeds"])), _heading(metric), *numbers, best])
    return _table(lines)


def _measured(task: Task, summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return "-"
    spreads = [summary["best"]["metrics"][name] for name in task.result_names]
    medians = " / ".join(_percent(spread["median"]) for spread in spreads)
    deviations = " / ".join(_percent(spread["standard_deviation"]) for spread in spreads)
    return medians if len(summary["best"]["seeds"]) == 1 else f"{medians} +- {deviations}"


def _heading(metric: str) -> str:
    name, _, suffix = metric.partition("_")
    return f"{_HEADINGS[name]} {suffix}".strip()


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _plain(text: str) -> str:
    return text.replace("|", "\\|")


def _table(lines: list[list[str]]) -> list[str]:
    rule = ["---"] * len(lines[0])
    return ["| " + " | ".join(cells) + " |" for cells in (lines[0], rule, *lines[1:])]
