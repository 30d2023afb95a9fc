"""Rows of `experiments/quality` (one per method, width and metric) -> rows of the comparison (one per model)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from homodistil.errors import UserError
from homodistil.report.run import clean

# Metric of the benchmark -> column of the comparison. Other metrics keep their names.
_COLUMNS = {"mlm_loss": "heldout_mlm_loss", "tokens_per_cpu_s": "tokens_per_s"}


def is_benchmark(path: Path) -> bool:
    """Whether `path` is to be read as a file of the benchmark; if it is not a file, it is taken for a run folder."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, a NUL byte
        return False


def read_benchmark(file: Path) -> list[dict[str, Any]]:
    """Rows for `write_comparison`, with lists of one number per seed. Raises `UserError` for any other file."""
    try:
        content = clean(json.loads(file.read_text(encoding="utf-8")))
        models: dict[tuple[str, str], dict[str, Any]] = {}
        for row in content:
            width = "" if row["x"] == row["variant"] else f", {row['x']}"
            name = f"{row['variant']}{width}"
            model = models.setdefault((row["variant"], str(row["x"])), {"name": name})
            model |= {
                column: row["config"][column] for column in ("parameters", "hidden_size") if column in row["config"]
            }
            model[_COLUMNS.get(row["metric"], row["metric"])] = row.get("values", [row["value"]])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file}: found no rows of experiments/quality ({type(error).__name__}: {str(error)[:200]}); give its "
            f"JSON file, or run folders"
        ) from None
    return list(models.values())
