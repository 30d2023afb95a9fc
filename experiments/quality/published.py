"""Full-scale models: not measured here (no GPU), beside published dev figures with their source.

Only figures that were read at the source are given; where the source could not be read, a model's row holds its size.
"""

from __future__ import annotations

from typing import NamedTuple

TASKS = ("CoLA", "MNLI-m", "MRPC", "QNLI", "QQP", "RTE", "SST-2", "STS-B")
HF = "Hugging Face, distillation README (before 2020: over-estimated by an evaluation bug)"
UNILM = "microsoft/unilm, minilm README"
PAPER = "HomoDistil, ICLR 2023, table 1 (sizes)"
QUOTED = "the paper's TEST set, with task distillation and augmentation, as quoted by henrform/DLNLP_25W_Group4"
NOT_READ = "MiniLMv2, arXiv 2012.15828: table not readable here"
NOTE = (
    "HomoDistil's table of single tasks could not be read; a secondary source (app.argminai.com on arXiv 2302.09632) "
    "has its 14 M model 3.3 points of task average above TinyBERT. One-shot, random init and MLM only are controls."
)


class Published(NamedTuple):
    model: str
    parameters_m: float
    figures: tuple[float | None, ...]
    """Dev set, per cent, by TASKS. None: not published there."""
    source: str


def _nothing() -> tuple[None, ...]:
    return (None,) * len(TASKS)


ROWS = (
    Published("BERT-base (teacher)", 109, (56.3, 84.7, 88.6, 91.8, 89.6, 69.3, 92.7, 89.0), HF),
    Published("BERT-base (teacher)", 109, (58.9, 84.5, 87.3, 91.7, 91.3, 68.6, 93.2, None), UNILM),
    Published("HomoBERT-base", 65.4, _nothing(), PAPER),
    Published("HomoBERT-small", 17.3, _nothing(), PAPER),
    Published("HomoBERT-xsmall", 15.6, _nothing(), PAPER),
    Published("HomoBERT-tiny", 14.1, _nothing(), PAPER),
    Published("DistilBERT", 66, (51.3, 82.1, 87.5, 89.2, 88.5, 59.9, 91.3, 86.9), HF),
    Published("TinyBERT, 4 layers", 14.5, (44.1, None, 86.4, None, None, 66.6, 92.6, None), QUOTED),
    Published("MiniLMv2, 6 layers, 768 wide", 66, _nothing(), NOT_READ),
    Published("MiniLM-L12-H384 (another teacher)", 33, (58.5, 85.7, 89.5, 91.5, 91.3, 73.3, 93.0, None), UNILM),
    Published("MiniLM-L6-H384 (another teacher)", 22, (47.5, 83.3, 88.9, 90.5, 90.6, 68.8, 91.5, None), UNILM),
)
