"""Exact match and F1 as the official scripts (evaluate-v1.1.py, evaluate-v2.0.py) define them, as fractions.

They are implemented here, because the libraries that have them need a model framework or network access.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

from homodistil.evaluation.squad.examples import Example

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """`text` in lower case, without ASCII punctuation and articles, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, truth: str) -> float:
    """1 if both texts are equal after normalisation, else 0."""
    return float(normalised(prediction) == normalised(truth))


def f1(prediction: str, truth: str) -> float:
    """F1 of the bags of words after normalisation. If one of them is empty: 1 if both are, else 0."""
    predicted, true = normalised(prediction).split(), normalised(truth).split()
    if not predicted or not true:
        return float(predicted == true)
    shared = sum((Counter(predicted) & Counter(true)).values())
    return 2 * shared / (len(predicted) + len(true))


def score(examples: Sequence[Example], predictions: Mapping[str, str]) -> dict[str, float]:
    """Means over the questions, with the best value over all answers of a question.

    Args:
        predictions: id -> answer text; "" means no answer.

    Returns:
        "exact" and "f1". If some questions have no answer, also "has_answer_exact" and "has_answer_f1" (over the
        questions with an answer) and "no_answer_accuracy" (over those without).
    """
    scores = {True: [], False: []}
    for example in examples:
        # As in the official script: answers that normalise to "" are ignored; without an answer, "" is correct.
        truths = [answer.text for answer in example.answers if normalised(answer.text)] or [""]
        prediction = predictions[example.ident]
        pair = tuple(max(metric(prediction, truth) for truth in truths) for metric in (exact_match, f1))
        scores[bool(example.answers)].append(pair)
    exact, overlap = _means(scores[True] + scores[False])
    values = {"exact": exact, "f1": overlap}
    if scores[False]:
        values["no_answer_accuracy"] = _means(scores[False])[0]
        if scores[True]:
            values["has_answer_exact"], values["has_answer_f1"] = _means(scores[True])
    return values


def _means(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(a for a, _ in pairs) / len(pairs), sum(b for _, b in pairs) / len(pairs)
