"""What a loss term is called where people read it.

In files and in the config the language-modelling term is `mlm` for every task: loss.mlm, loss/mlm in metrics.jsonl and
TensorBoard. To a reader of a decoder's run it is "lm".
"""

from __future__ import annotations

_LABELS = {("causal", "mlm"): "lm"}


def term_label(term: str, task: object) -> str:
    """The label of a term in a run of the task `task` (data.task; whatever a damaged config may have instead)."""
    return _LABELS.get((task, term), term) if isinstance(task, str) else term


def language_modelling(task: object) -> str:
    """What is learnt from text: MLM, or LM of a decoder, as in "the MLM head"."""
    return term_label("mlm", task).upper()
