"""What fields of the loss that are `auto` become for a family of models: decided here, and nowhere else."""

from __future__ import annotations

import dataclasses

from homodistil.config.schema import LossConfig
from homodistil.models.architecture import Architecture


def settled_fields(loss: LossConfig, architecture: Architecture) -> dict[str, str]:
    """Field of `loss` that is `auto` -> its value for teachers of this architecture.

    Raw scores are TinyBERT's, and grow without bound where queries and keys are large: in a decoder to 280 where the KL
    was 5. Raw states are the paper's; where nothing normalises the residual stream, single dims of it reach thousands
    (Sun et al. 2024, arXiv 2402.17762), and its MSE is theirs.
    """
    values = {
        "attention_target": "probabilities_kl" if architecture.is_causal else "scores",
        "hidden_space": "normalised" if architecture.is_pre_norm else "raw",
    }
    return {name: value for name, value in values.items() if getattr(loss, name) == "auto"}


def settled(loss: LossConfig, architecture: Architecture) -> LossConfig:
    """A copy of `loss` in which nothing of that is left open."""
    return dataclasses.replace(loss, **settled_fields(loss, architecture))
