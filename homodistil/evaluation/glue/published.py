"""Published dev scores of the rivals, put beside our own in the table. Only what its source was read for is verified.

Percent, with the metric of the source (MRPC and QQP: F1 in some, accuracy in others). Averages are left out: the
sources average over different tasks. For HomoDistil's own tables there is no readable source: its rows have sizes only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_DISTILBERT = "README of Hugging Face's distillation examples"
_MINILM = "README of microsoft/unilm, minilm"
_MINILM_PAPERS = "tables of the MiniLM and MiniLMv2 papers, from memory"
_HOMODISTIL = "sizes: weights only, slides of arXiv:2302.09632's authors; its scores per task could not be read"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One model of a paper."""

    model: str
    millions: float
    """Parameters as the source counts them."""
    source: str
    is_verified: bool = True
    """Read in the source, not remembered."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Task name -> percent; mnli is the matched set."""


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
        model="MiniLMv2 L6-H768",
        millions=66,
        source=_MINILM_PAPERS,
        is_verified=False,
        scores=_scores(52.5, 84.2, 88.9, 90.8, 91.1, 72.1, 92.4, None),
    ),
    Published(
        model="MiniLM L6-H768",
        millions=66,
        source=_MINILM_PAPERS,
        is_verified=False,
        scores=_scores(49.2, 84.0, 88.4, 91.0, 91.0, 71.5, 92.0, None),
    ),
    Published(
        model="TinyBERT L6-H768 (general distillation only)",
        millions=66,
        source=_MINILM_PAPERS,
        is_verified=False,
        scores=_scores(42.8, 83.5, 88.4, 90.5, 90.6, 72.2, 91.6, None),
    ),
    Published(model="HomoBERT-base", millions=65, source=_HOMODISTIL),
    Published(model="HomoBERT-small", millions=17.3, source=_HOMODISTIL),
    Published(model="HomoBERT-xsmall", millions=15.6, source=_HOMODISTIL),
    Published(model="HomoBERT-tiny", millions=14.1, source=f"{_HOMODISTIL}; the slides print 14.5 for tiny"),
)
