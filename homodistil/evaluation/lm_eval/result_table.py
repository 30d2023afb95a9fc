"""The result table: a row for each metric of each task, a column for each checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from homodistil.evaluation.glue.grid import write_output

MARKDOWN_FILE = "lm_eval.md"
JSON_FILE = "lm_eval.json"


def write_table(scores: Mapping[str, Mapping[str, Any]], out: Path) -> str:
    """Write lm_eval.json and lm_eval.md into `out`, atomically. Returns the Markdown.

    Args:
        scores: checkpoint, as given -> its results in the harness's form (`simple_evaluate`).
    """
    text = _markdown(scores)
    write_output(out / JSON_FILE, json.dumps(dict(scores), indent=2, default=str) + "\n")
    write_output(out / MARKDOWN_FILE, text)
    return text


def _markdown(scores: Mapping[str, Mapping[str, Any]]) -> str:
    first = next(iter(scores.values()))
    head = ["task", "metric", "shots", "examples", *(name.replace("|", "\\|") for name in scores)]
    lines = [head, ["---"] * len(head)]
    lines.append(["parameters, M", "", "", "", *(_millions(results) for results in scores.values())])
    for task, metrics in first["results"].items():
        for key in (key for key, value in metrics.items() if _is_score(key, value)):
            count = first.get("n-samples", {}).get(task, {}).get("effective", "-")
            facts = [task, _metric(key, task, first), str(first.get("n-shot", {}).get(task, "-")), str(count)]
            lines.append([*facts, *(_cell(results["results"].get(task, {}), key) for results in scores.values())])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    version, limit = first.get("lm_eval_version"), first.get("config", {}).get("limit")
    note = f"Scores of lm-evaluation-harness {version} +- their standard errors, where it gives them."
    if limit is not None:
        note += f" Only the first {limit:g} examples of each task: to try it out, not to compare."
    return f"# lm-eval\n\n{table}\n\n{note}\n"


def _is_score(key: str, value: Any) -> bool:
    """`acc,none` and the like; not the standard errors, names and counts beside them."""
    name, _, filtered_by = key.partition(",")
    return bool(filtered_by) and not name.endswith("_stderr") and isinstance(value, (int, float))


def _metric(key: str, task: str, results: Mapping[str, Any]) -> str:
    """`acc (higher is better)`; with the filter of the answers where there is one."""
    name, _, filtered_by = key.partition(",")
    is_higher_better = results.get("higher_is_better", {}).get(task, {}).get(name)
    direction = {True: "higher is better", False: "lower is better"}.get(is_higher_better)
    notes = [note for note in (filtered_by if filtered_by != "none" else None, direction) if note]
    return f"{name} ({', '.join(notes)})" if notes else name


def _cell(metrics: Mapping[str, Any], key: str) -> str:
    name, _, filtered_by = key.partition(",")
    value, error = metrics.get(key), metrics.get(f"{name}_stderr,{filtered_by}")
    if not isinstance(value, (int, float)):
        return "-"
    return f"{value:.4g} +- {error:.2g}" if isinstance(error, (int, float)) else f"{value:.4g}"


def _millions(results: Mapping[str, Any]) -> str:
    count = results.get("config", {}).get("model_num_parameters")
    return f"{count / 1e6:.1f}" if isinstance(count, (int, float)) else "-"
