"""Published dev scores of other models for the table. Each row was copied from the source that it names.

Scores are percentages, with the metric of the source (MRPC and QQP: F1 in some, accuracy in others). Averages are left
out, because sources average over different tasks. Models whose source could not be read have no row; the tables of the
HomoDistil paper are among these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_DISTILBERT = "README of Hugging Face's distillation examples"
_MINILM = "README of microsoft/unilm, minilm"
_ELECTRA = "README of google-research/electra"


@dataclass(frozen=True, kw_only=True)
class Published:
    """Published scores of one model."""

    model: str
    millions: float
    """Million parameters, as counted by the source."""
    source: str
    scores: Mapping[str, float] = field(default_factory=dict)
    """Task name -> score in percent; mnli is the matched set."""


def _scores(*values: float | None) -> dict[str, float]:
    names = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


ROWS = (
    Published(
        model="BERT-base uncased (teacher)",
        millions=109,
        source=_DISTILBERT,
        scores=_scores(56.3, 84.7, 88.6, 91.8, 89.6, 69.3, 92.7, 89.0),
    ),
    Published(
        model="BERT-base (teacher)",
        millions=109,
        source=_MINILM,
        scores=_scores(58.9, 84.5, 87.3, 91.7, 91.3, 68.6, 93.2, None),
    ),
    Published(
        model="DistilBERT uncased",
        millions=66,
        source=_DISTILBERT,
        scores=_scores(51.3, 82.1, 87.5, 89.2, 88.5, 59.9, 91.3, 86.9),
    ),
    Published(
        model="MiniLM L12-H384 (teacher UniLMv2)",
        millions=33,
        source=_MINILM,
        scores=_scores(58.5, 85.7, 89.5, 91.5, 91.3, 73.3, 93.0, None),
    ),
    Published(
        model="MiniLM L6-H384 (teacher UniLMv2)",
        millions=22,
        source=_MINILM,
        scores=_scores(47.5, 83.3, 88.9, 90.5, 90.6, 68.8, 91.5, None),
    ),
    Published(
        model="ELECTRA-Small (no distillation)",
        millions=14,
        source=_ELECTRA,
        scores=_scores(57.0, 81.3, 88.0, 88.4, 89.0, 66.7, 91.2, 87.5),
    ),
)
