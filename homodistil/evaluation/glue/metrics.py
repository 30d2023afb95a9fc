"""GLUE's metrics out of scikit-learn and scipy. All are fractions (a correlation lies between -1 and 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from homodistil.evaluation.glue.tasks import Task


def _correlation(function) -> Callable[[np.ndarray, np.ndarray], float]:
    def of(labels: np.ndarray, predictions: np.ndarray) -> float:
        # Undefined for a constant: 0 says that nothing is told apart, as matthews_corrcoef does.
        if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0
        return float(function(labels, predictions).statistic)

    return of


METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    # Of class 1; 0 without a true or predicted one.
    "f1": lambda labels, predictions: f1_score(labels, predictions, zero_division=0.0),
    "matthews": matthews_corrcoef,
    "pearson": _correlation(pearsonr),
    "spearman": _correlation(spearmanr),
}


def compute(task: Task, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics of one dev set.

    Args:
        outputs: the model's logits, (N, classes), or (N, 1) for a regression.
        labels: (N,) class numbers, or similarities.

    Returns:
        One number a metric of the task, and `score`, their mean. Outputs that are not finite score 0.
    """
    outputs = np.asarray(outputs, dtype=np.float64)
    if not np.isfinite(outputs).all():
        values = dict.fromkeys(task.metrics, 0.0)
    else:
        predictions = outputs[:, 0] if task.is_regression else outputs.argmax(-1)
        values = {name: float(METRICS[name](np.asarray(labels), predictions)) for name in task.metrics}
    return values | {"score": sum(values.values()) / len(values)}
