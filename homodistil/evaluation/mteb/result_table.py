"""The result table: a row for each task, a column for each checkpoint, and shares of the first one's scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from homodistil.evaluation.glue.grid import write_output

MARKDOWN_FILE = "mteb.md"
JSON_FILE = "mteb.json"
DASH = "-"


@dataclass
class Scores:
    """What is scored so far."""

    identities: Mapping[str, str]
    """Checkpoint, as given -> hash of its files."""
    tasks: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Task -> checkpoint -> result (`score`)."""

    def add(self, checkpoint: str, result: dict[str, Any]) -> None:
        self.tasks.setdefault(result["result"]["task_name"], {})[checkpoint] = result

    def means(self) -> dict[str, float]:
        """Checkpoint -> mean main score over the tasks that all checkpoints have."""
        complete = [results for results in self.tasks.values() if results.keys() == self.identities.keys()]
        if not complete:
            return {}
        return {name: sum(row[name]["main_score"] for row in complete) / len(complete) for name in self.identities}


def write_table(scores: Scores, out: Path) -> str:
    """Write mteb.json and mteb.md into `out`, atomically. Returns the Markdown."""
    text = _markdown(scores)
    content = {"checkpoints": dict(scores.identities), "mean": scores.means(), "tasks": scores.tasks}
    write_output(out / JSON_FILE, json.dumps(content, indent=2) + "\n")
    write_output(out / MARKDOWN_FILE, text)
    return text


def _markdown(scores: Scores) -> str:
    names = list(scores.identities)
    rows = [["task", "metric", *(name.replace("|", "\\|") for name in names)]]
    rows.append(["---", "---", *["--:"] * len(names)])
    results = [row for row in scores.tasks.values()]
    sizes = {name: f"{row[name]['parameters'] / 1e6:.1f}" for row in results for name in row}
    rows.append(["parameters, M", "", *(sizes.get(name, DASH) for name in names)])
    for task, row in scores.tasks.items():
        metric = next(iter(row.values()))["metric"]
        values = {name: result["main_score"] for name, result in row.items()}
        rows.append([task, metric, *_cells(values, names)])
    if len(scores.tasks) > 1 and (means := scores.means()):
        rows.append(["mean", "", *_cells(means, names)])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    version = results[0][next(iter(results[0]))]["result"]["mteb_version"]
    return f"# MTEB\n\n{table}\n\nMain scores of mteb {version}, and their share of {names[0]}'s.\n"


def _cells(values: Mapping[str, float], names: list[str]) -> list[str]:
    """Scores, and behind the first their share of it."""
    first = values.get(names[0])
    cells = [f"{values[name]:.4f}" if name in values else DASH for name in names]
    for place, name in enumerate(names[1:], 1):
        if first and name in values:
            cells[place] += f" ({values[name] / first:.1%})"
    return cells
