"""Start and end logits of all windows -> one answer text per question.

The best of all spans of at most `max_answer_tokens` is found. (The code of the BERT paper searches only the pairs of
the 20 best starts and ends.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from homodistil.evaluation.squad.examples import Example
from homodistil.evaluation.squad.features import Windows


def answers(
    examples: Sequence[Example],
    windows: Windows,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    max_answer_tokens: int,
    null_threshold: float | None,
) -> dict[str, str]:
    """Id of each example -> answer text; "" for no answer.

    Args:
        windows: from `features.windows`, for these examples.
        start_logits, end_logits: (windows, tokens); the padding on the right may have any value.
        max_answer_tokens: maximum length of an answer.
        null_threshold: give no answer if the null score exceeds the score of the best span by more than this. The null
            score is the sum of start and end logit of [CLS], the lowest over the windows of a question, as in the code
            of the BERT paper. None: always answer (v1.1).
    """
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(examples)
    null = [np.inf] * len(examples)
    for i, (owner, spans) in enumerate(zip(windows.owners, windows.spans, strict=True)):
        start, end, token = (np.asarray(start_logits[i]), np.asarray(end_logits[i]), windows.null_tokens[i])
        null[owner] = min(null[owner], float(start[token] + end[token]))
        span = _best_span(start, end, spans, max_answer_tokens)
        if span and span[0] > best[owner][0]:
            score, first, last = span
            best[owner] = (score, examples[owner].context[spans[first][0] : spans[last][1]])
    return {
        example.ident: "" if null_threshold is not None and null[i] - best[i][0] > null_threshold else best[i][1]
        for i, example in enumerate(examples)
    }


def _best_span(start: np.ndarray, end: np.ndarray, spans, max_answer_tokens: int) -> tuple[float, int, int] | None:
    """(score, first token, last token) of the best span inside the context; None if no span has a finite score."""
    context = np.array([i for i, span in enumerate(spans) if span is not None and span[1] > span[0]])
    if not len(context):
        return None
    scores = start[context][:, None].astype(np.float64) + end[context][None, :]
    lengths = context[None, :] - context[:, None] + 1
    scores = np.where((lengths >= 1) & (lengths <= max_answer_tokens) & np.isfinite(scores), scores, -np.inf)
    first, last = np.unravel_index(int(scores.argmax()), scores.shape)
    score = float(scores[first, last])
    return (score, int(context[first]), int(context[last])) if score > -np.inf else None
