"""The labelled sentences of the probes: parts of the packaged STS-B and movie sentences, the same for every model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

from homodistil.data.sources.assets import EMBEDDED
from homodistil.evaluation.glue.sources import load_task
from homodistil.evaluation.glue.tasks import MOVIE, find_task
from homodistil.evaluation.glue.tsv import Split

NUM_PAIRS = 3000
"""Training pairs of STS-B that the ridge regression is fitted on."""
NUM_MOVIE = 3000
"""Training sentences of the movie ratings."""
_SEED = 0


class Examples(NamedTuple):
    """Dev sets whole (1,500 pairs, 1,000 sentences), training sets sampled."""

    pairs_train: Split
    """STS-B: two sentences and their similarity, 0 to 5."""
    pairs_dev: Split
    movie_train: Split
    """A sentence and 0 (negative) or 1 (positive)."""
    movie_dev: Split


def load_examples(cache_dir: Path, limit: int | None = None) -> Examples:
    """Fetched and unpacked on first use.

    Args:
        limit: at most so many of each of the four, to try it out.

    Raises:
        UserError: a package cannot be fetched.
    """
    pairs, movie = (load_task(find_task(name), EMBEDDED, cache_dir) for name in ("stsb", MOVIE.name))
    return Examples(
        _sample(pairs.train, limit or NUM_PAIRS),
        _sample(pairs.dev[""], limit),
        _sample(movie.train, limit or NUM_MOVIE),
        _sample(movie.dev[""], limit),
    )


def _sample(split: Split, size: int | None) -> Split:
    """So many examples, drawn with a fixed seed: the files are ordered by genre. None: all of them."""
    if size is None or size >= len(split.labels):
        return split
    chosen = random.Random(_SEED).sample(range(len(split.labels)), size)
    return Split([split.texts[i] for i in chosen], [split.labels[i] for i in chosen])
