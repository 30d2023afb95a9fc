"""How an event is compensated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from homodistil.models.classifier import LogitKind
from homodistil.models.sentence_head import PoolingMode


@dataclass(frozen=True)
class Options:
    mode: Literal["refit", "project", "full"] = "full"
    ridge: float | None = 1e-2
    """Ridge of the refit, as a share of the mean variance of a linear's inputs (> 0); None: chosen for each linear
    (`fit_linear`)."""
    basis: Literal["fisher", "pca", "learned"] = "fisher"
    """project and full: what the residual stream's subspace is chosen by. fisher and pca: in closed form
    (projection.py), where fisher needs a trained head, vectors (`pooling`) or labels (`logits`); learned: such a basis,
    then trained (learned_basis.py)."""
    basis_steps: int = 60
    """learned: steps of its training, each on one micro-batch per rank."""
    basis_lr: float = 0.05
    """learned: angle (radians) by which a column turns in one of the first steps; it falls linearly to 0."""
    pooling: PoolingMode | None = None
    """Of a sentence embedder: how its vectors are pooled, by whose gradients fisher then weighs directions."""
    logits: LogitKind | None = None
    """Of a classifier: what its logits are, by whose gradients fisher then weighs directions."""
    seed: int = 0
    """project and full: of drawn labels or directions, and of the mixed basis."""

    @property
    def maps(self) -> bool:
        """Whether heads are rotated and the residual stream is projected."""
        return self.mode != "refit"

    @property
    def fits_linears(self) -> bool:
        """Whether linears are fitted, and not norms and the vocabulary head alone."""
        return self.mode != "project"
