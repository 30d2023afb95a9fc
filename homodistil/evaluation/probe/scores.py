"""The four measures of a probe, from vectors of sentences alone (scikit-learn)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from homodistil.evaluation.glue.metrics import METRICS
from homodistil.evaluation.glue.tsv import Split
from homodistil.evaluation.probe.examples import Examples
from homodistil.evaluation.probe.features import SentenceFeatures

PENALTIES = tuple(10.0**power for power in range(6))
"""Strengths of the ridge, of which leave-one-out on the training examples chooses (features have variance 1)."""


class ProbeScores(NamedTuple):
    """All are better when they are higher."""

    cosine: float
    """STS-B dev: Spearman of the cosine of both vectors with the similarity; nothing is fitted."""
    centred_cosine: float
    """The same after the mean vector of the training pairs is subtracted."""
    pairs_ridge: float
    """STS-B dev: Spearman of a ridge regression on |u - v| and u * v."""
    movie_ridge: float
    """Movie dev: accuracy of a ridge classifier on the vector."""


def probe(features: SentenceFeatures, examples: Examples) -> ProbeScores:
    """The measures of a frozen checkpoint; the same ones each time it is called."""
    train, dev = (_pair_vectors(features, split) for split in (examples.pairs_train, examples.pairs_dev))
    movie_train, movie_dev = (
        features.encode([texts[0] for texts in split.texts]) for split in (examples.movie_train, examples.movie_dev)
    )
    labels, correlation = np.asarray(examples.pairs_dev.labels), METRICS["spearman"]
    return ProbeScores(
        correlation(labels, cosine(*dev)),
        correlation(labels, cosine(*centred(dev, train))),
        correlation(labels, ridge_similarity(train, np.asarray(examples.pairs_train.labels), dev)),
        ridge_accuracy(movie_train, examples.movie_train.labels, movie_dev, examples.movie_dev.labels),
    )


Vectors = tuple[np.ndarray, np.ndarray]
"""First and second sentences of N pairs: two arrays (N, hidden)."""


def _pair_vectors(features: SentenceFeatures, split: Split) -> Vectors:
    first, second = zip(*split.texts, strict=True)
    both = features.encode([*first, *second]).astype(np.float64)
    return both[: len(first)], both[len(first) :]


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine of each pair, (N,); 0 where a vector is 0."""
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(1) / np.maximum(norms, np.finfo(np.float64).tiny)


def centred(vectors: Vectors, train: Vectors) -> Vectors:
    """`vectors` without the mean of all training sentences: what all sentences share says nothing about any of them."""
    mean = np.concatenate(train).mean(0)
    return vectors[0] - mean, vectors[1] - mean


def ridge_similarity(train: Vectors, labels: np.ndarray, dev: Vectors) -> np.ndarray:
    """Predicted similarities of the dev pairs, (N,)."""
    model = make_pipeline(StandardScaler(), RidgeCV(PENALTIES)).fit(_pair_features(*train), labels)
    return model.predict(_pair_features(*dev))


def ridge_accuracy(train: np.ndarray, labels: list[int], dev: np.ndarray, dev_labels: list[int]) -> float:
    """Share of the dev sentences whose class a ridge classifier finds."""
    model = make_pipeline(StandardScaler(), RidgeClassifierCV(PENALTIES)).fit(train, labels)
    return float(model.score(dev, dev_labels))


def _pair_features(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(N, 2 hidden): the difference without its sign, and the product; the order of a pair does not count."""
    return np.concatenate([np.abs(first - second), first * second], axis=1)
