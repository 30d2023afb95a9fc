"""Exact match and F1 as the official scripts (evaluate-v1.1.py, evaluate-v2.0.py) define them, as fractions.

Written out: the libraries that have them bring a model framework or the network along, for four formulas.
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
    """Lower case, without punctuation (ASCII) and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, truth: str) -> float:
    return float(normalised(prediction) == normalised(truth))


def f1(prediction: str, truth: str) -> float:
    """F1 of the bags of words; where one side is empty, 1 if both are."""
    predicted, true = normalised(prediction).split(), normalised(truth).split()
    if not predicted or not true:
        return float(predicted == true)
    shared = sum((Counter(predicted) & Counter(true)).values())
    return 2 * shared / (len(predicted) + len(true))


def score(examples: Sequence[Example], predictions: Mapping[str, str]) -> dict[str, float]:
    """Mean over the questions of the best value over a question's answers.

    Args:
        predictions: id -> answer text; "" says that there is none.

    Returns:
        exact, f1; where some questions have no answer also has_answer_exact, has_answer_f1 (the others alone) and
        no_answer_accuracy.
    """
    scores = {True: [], False: []}
    for example in examples:
        # As officially: answers that normalise to nothing do not count, and no answer at all is the empty one.
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
