"""Shapes that the step is measured at, and the schedule that leads through their widths."""

from __future__ import annotations

from dataclasses import dataclass, field

VOCABULARY = 30522


@dataclass(frozen=True)
class Shape:
    """A teacher and how it is distilled here."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    recipe: str
    batch: dict[str, tuple[int, int]]
    """Device type, or "quick" -> (global batch, micro-batch of a rank) in sequences, a rank."""
    overrides: tuple[str, ...] = ()
    vocabulary: int = VOCABULARY


_BERT_BASE = {"layers": 12, "hidden": 768, "ffn": 3072, "heads": 12}

SHAPES = {
    "homobert-small": Shape(
        **_BERT_BASE, recipe="homobert-small-paper", batch={"cpu": (32, 16), "quick": (2, 2), "cuda": (256, 256)}
    ),
    "homobert-base": Shape(
        **_BERT_BASE, recipe="homobert-base-paper", batch={"cpu": (32, 16), "quick": (2, 2), "cuda": (256, 256)}
    ),
    "quickstart": Shape(
        layers=2,
        hidden=128,
        ffn=512,
        heads=2,
        recipe="quickstart",
        batch={"cpu": (32, 16), "quick": (32, 16), "cuda": (512, 512)},
    ),
    "tiny": Shape(
        layers=3,
        hidden=96,
        ffn=192,
        heads=4,
        recipe="quickstart",
        batch={"cpu": (16, 8), "quick": (8, 4), "cuda": (16, 8)},
        overrides=(
            "student.preset=custom",
            "student.hidden_size=48",
            "student.intermediate_size=96",
            "student.num_attention_heads=2",
        ),
        vocabulary=2000,
    ),
}
"""By what they are distilled to: HomoBERT from BERT-base, the quickstart from its BERT-tiny; "tiny" is for tests."""


@dataclass(frozen=True)
class Plan:
    """How long each width is trained: `settle` steps at full width, then events `interval` steps apart."""

    interval: int
    events: int = 7
    settle: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settle", self.interval * -(-3 // self.interval))

    @property
    def end_step(self) -> int:
        """Update of the last event."""
        return self.settle + self.interval * self.events

    @property
    def num_steps(self) -> int:
        """t_f = 0.7 T, counted from the end of settling: 7 stretches with events, 3 at the target."""
        return self.end_step + round(self.interval * self.events * 3 / 7)
