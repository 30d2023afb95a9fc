"""The metrics of GLUE, from scikit-learn and scipy. All are fractions; correlations are between -1 and 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from homodistil.evaluation.glue.tasks import Task


def _correlation(function) -> Callable[[np.ndarray, np.ndarray], float]:
    def of(labels: np.ndarray, predictions: np.ndarray) -> float:
        # Undefined for constant values; 0, as in matthews_corrcoef, means no correlation.
        if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0
        return float(function(labels, predictions).statistic)

    return of


METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    # F1 of class 1; 0 if class 1 is neither true nor predicted.
    "f1": lambda labels, predictions: f1_score(labels, predictions, zero_division=0.0),
    "matthews": matthews_corrcoef,
    "pearson": _correlation(pearsonr),
    "spearman": _correlation(spearmanr),
}


def compute(task: Task, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics of one dev set.

    Args:
        outputs: logits of the model, (N, classes), or (N, 1) for a regression.
        labels: class numbers or similarities, (N,).

    Returns:
        One number per metric of the task, and `score`, their mean. All are 0 if an output is not finite.
    """
    outputs = np.asarray(outputs, dtype=np.float64)
    if not np.isfinite(outputs).all():
        values = dict.fromkeys(task.metrics, 0.0)
    else:
        predictions = outputs[:, 0] if task.is_regression else outputs.argmax(-1)
        values = {name: float(METRICS[name](np.asarray(labels), predictions)) for name in task.metrics}
    return values | {"score": sum(values.values()) / len(values)}
