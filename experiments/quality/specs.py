"""What one run of a study is, and the address of its results: a hash of everything they depend on."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from homodistil.config import command_line
from homodistil.config.schema import RunConfig

RESULTS_VERSION = "2"
"""Raise it when a change of the code changes what runs come to: results of before are then no longer used."""
# What decides nothing about a run's results.
_FREE = {"run": None, "data": ("cache_dir", "workers"), "train": ("save_every_steps", "log_every_steps")}
_LATER = {
    "data": (
        *("texts", "pooling", "prompt", "pair_columns", "truncation", "label_column", "check_label_order"),
        *("short_steps",),
    ),
    "loss": (
        *("pooled_cosine", "pooled_mse", "pooled_similarity", "similarity_temperature"),
        *("scores_kl", "scores_mse", "scores_temperature", "labels"),
    ),
    "student": ("vocab", "layer_choice"),
    "teacher": ("correction_seed", "outputs"),
    "pruning": ("basis", "basis_steps", "basis_lr", "depth_schedule"),
    "train": ("decay_fraction", "uncut_lr_share"),
}
"""Fields that came after results were kept: where they have their defaults, results of before keep their names."""


class Shape(NamedTuple):
    """Target size of a student."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int

    @property
    def overrides(self) -> tuple[str, ...]:
        return ("student.preset=custom", *(f"student.{name}={value}" for name, value in self._asdict().items()))


@dataclass(frozen=True)
class RunSpec:
    """One run: overrides of the run config, and how progress lines call it."""

    label: str
    overrides: tuple[str, ...]

    @classmethod
    def of(cls, label: str, *parts: Sequence[str], steps: int, lr: float, seed: int) -> RunSpec:
        """`parts` in order (a later field wins), then steps, rate and seed."""
        settings = (f"train.steps={steps}", f"train.lr={lr:g}", f"train.seed={seed}")
        return cls(f"{label} lr {lr:g} seed {seed}", (*(field for part in parts for field in part), *settings))

    def config(self) -> RunConfig:
        """A copy that the caller may change. Raises `UserError` when an override is none."""
        return copy.deepcopy(_parsed(self.overrides))

    @functools.cached_property
    def key(self) -> str:
        """Hash of the resolved config (without what decides nothing) and RESULTS_VERSION."""
        return content_hash(relevant(self.config()))


@functools.cache
def _parsed(overrides: tuple[str, ...]) -> RunConfig:
    """Studies ask for the config of the same run again and again, and parsing takes a fifth of a second."""
    return command_line.parse(list(overrides))


def relevant(config: RunConfig) -> dict:
    content = config.to_dict()
    for section, names in _FREE.items():
        content[section] = {} if names is None else {n: v for n, v in content[section].items() if n not in names}
    defaults = RunConfig().to_dict()
    for section, names in _LATER.items():
        content[section] = {n: v for n, v in content[section].items() if n not in names or v != defaults[section][n]}
    return content


def content_hash(content: object) -> str:
    text = json.dumps([RESULTS_VERSION, content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
