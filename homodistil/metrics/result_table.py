"""The result table of a run: result.json in the run folder, and the same rows as text for the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from homodistil.files import to_json, write_atomically, writing

RESULT_FILE = "result.json"
PLAN_FILE = "plan.json"
"""The plan of the run, written before training (planning/)."""
LATENCY_FILE = "latency.json"
"""How fast the run's models are on one machine, as `homodistil latency RUN_DIR` measured it."""
ROW_FILE = "row.json"
"""The row of one model, written before all rows of the run are known."""
DASH = "-"

Row = Mapping[str, Any]
"""One model: name, parameters, hidden_size, heldout_mlm_loss (nats) and masked_top1 (fraction), or of a causal model
heldout_lm_loss (nats), perplexity and bits_per_byte; kl_to_teacher (nats); of a model without a head the
hidden_distance, attention_distance and embedding_distance to its teacher (loss terms on held-out text); of an embedder
cosine_to_teacher (mean over held-out texts) and recall_at_10 (of the teacher's nearest texts); of a sequence classifier
kl_to_teacher and label_agreement (share of texts), or, where labels are scores, score_mse, score_pearson and
score_spearman (means over labels), and by ground-truth labels, as it suits these, label_accuracy, label_f1
(micro-averaged), or label_mse, label_pearson and label_spearman; of a token classifier kl_to_teacher and
token_agreement (share of tokens), or score_mse, and by ground-truth labels label_accuracy, label_macro_f1 and, of
named entities, label_entity_f1;
tokens_per_s_first and tokens_per_s_last (training, first and last logged interval); of a teacher with fewer pieces
than it was given with, parameters_before, pieces_before and cached_teacher (its folder's name in the cache). Absent or
None: not measured."""

# Column -> (heading, how a number is written)
COLUMNS = {
    "name": ("model", "{}"),
    "parameters": ("parameters", "{:,.0f}"),
    "hidden_size": ("hidden size", "{:.0f}"),
    "heldout_mlm_loss": ("held-out MLM loss", "{:.3f}"),
    "masked_top1": ("masked top-1", "{:.1%}"),
    "heldout_lm_loss": ("held-out loss", "{:.3f}"),
    "perplexity": ("perplexity", "{:,.2f}"),
    "bits_per_byte": ("bits per byte", "{:.3f}"),
    "kl_to_teacher": ("KL to teacher", "{:.3f}"),
    "hidden_distance": ("hidden distance", "{:.3g}"),
    "attention_distance": ("attention distance", "{:.3g}"),
    "embedding_distance": ("embedding distance", "{:.3g}"),
    "cosine_to_teacher": ("cosine to teacher", "{:.4f}"),
    "recall_at_10": ("recall@10", "{:.1%}"),
    "label_agreement": ("same label", "{:.1%}"),
    "token_agreement": ("same label", "{:.1%}"),
    "score_mse": ("MSE to teacher", "{:.3g}"),
    "score_pearson": ("Pearson", "{:.4f}"),
    "score_spearman": ("Spearman", "{:.4f}"),
    "label_accuracy": ("accuracy", "{:.1%}"),
    "label_f1": ("micro-F1", "{:.1%}"),
    "label_macro_f1": ("macro-F1", "{:.1%}"),
    "label_entity_f1": ("entity F1", "{:.1%}"),
    "label_mse": ("MSE to labels", "{:.3g}"),
    "label_pearson": ("Pearson to labels", "{:.4f}"),
    "label_spearman": ("Spearman to labels", "{:.4f}"),
    "tokens_per_s_first": ("tokens/s first", "{:,.0f}"),
    "tokens_per_s_last": ("tokens/s last", "{:,.0f}"),
}


TOKEN_LABEL_COLUMNS = ("label_accuracy", "label_macro_f1", "label_entity_f1")
TEXT_LABEL_COLUMNS = ("label_accuracy", "label_f1", "label_mse", "label_pearson", "label_spearman")
LABEL_COLUMNS = tuple(dict.fromkeys((*TEXT_LABEL_COLUMNS, *TOKEN_LABEL_COLUMNS)))
"""What is measured by ground-truth labels (data.label_column)."""
HELDOUT_COLUMNS = {
    "mlm_loss": "heldout_mlm_loss",
    "masked_top1": "masked_top1",
    "lm_loss": "heldout_lm_loss",
    "perplexity": "perplexity",
    "bits_per_byte": "bits_per_byte",
    "kl_to_teacher": "kl_to_teacher",
    "hidden_distance": "hidden_distance",
    "attention_distance": "attention_distance",
    "embedding_distance": "embedding_distance",
    "vector_cosine": "cosine_to_teacher",
    "recall_at_10": "recall_at_10",
    **{name: name for name in ("label_agreement", "token_agreement", "score_mse", "score_pearson", "score_spearman")},
    **{name: name for name in LABEL_COLUMNS},
}
"""What evaluation on held-out text measures -> column."""

TASK_COLUMNS = {
    "mlm": ("heldout_mlm_loss", "masked_top1"),
    "causal": ("heldout_lm_loss", "perplexity", "bits_per_byte"),
    "none": ("hidden_distance", "attention_distance", "embedding_distance"),
    "embedding": ("cosine_to_teacher", "recall_at_10"),
    "scores": ("label_agreement", "score_mse", "score_pearson", "score_spearman", *TEXT_LABEL_COLUMNS),
    "token_scores": ("token_agreement", "score_mse", *TOKEN_LABEL_COLUMNS),
}
"""Task (data/task.py) -> columns that not every task has."""
_OF_ONE_TASK = frozenset().union(*TASK_COLUMNS.values())


def write_result(run_dir: Path, rows: Sequence[Row]) -> Path:
    """Write result.json (atomically; numbers that are not finite become null). Returns its path."""
    path = Path(run_dir) / RESULT_FILE
    lines = ",\n ".join(to_json(row) for row in rows)
    with writing(path):
        write_atomically(path, f"[{lines}]\n")
    return path


def read_result(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of result.json. Raises FileNotFoundError if the run has not written it yet."""
    return json.loads((Path(run_dir) / RESULT_FILE).read_text(encoding="utf-8"))


def is_teacher(row: Row) -> bool:
    """Whether a row is the teacher's."""
    return str(row.get("name", "")).lower().startswith("teacher")


def columns_of(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """The columns that these rows need: of what one task alone measures, those that any row has."""
    used = set().union(*rows)
    unused = _OF_ONE_TASK - used
    if not used.isdisjoint((*TASK_COLUMNS["none"], *TASK_COLUMNS["embedding"], "score_mse")):
        unused |= {"kl_to_teacher"}  # of probabilities, which such a model has not
    return {column: how for column, how in COLUMNS.items() if column not in unused}


def cells(row: Row, columns: Mapping[str, tuple[str, str]] = COLUMNS) -> list[str]:
    """The row as text, one string for each column; what is missing, None or not finite is a dash."""
    return [cell(row.get(column), form) for column, (_, form) in columns.items()]


def cell(value: Any, form: str) -> str:
    """One value as text: formatted with `form` if it is a number, a dash if it is None or not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return DASH
    # Values that are not numbers (of a file that was edited) are shown unchanged.
    return form.format(value) if isinstance(value, (int, float)) else str(value)


def format_table(rows: Sequence[Row]) -> str:
    """Plain-text table: names on the left, numbers aligned on the right. No trailing newline."""
    columns = columns_of(rows)
    return aligned([[heading for heading, _ in columns.values()]] + [cells(row, columns) for row in rows])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines with the same number of cells as text in aligned columns; the first line has the headings."""
    lines = [list(line) for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join([line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)])
        for line in lines
    )
