"""SQuAD's official scores, by hand."""

from __future__ import annotations

import pytest

from homodistil.evaluation.squad.examples import Answer, Example
from homodistil.evaluation.squad.metrics import exact_match, f1, normalised, score


@pytest.mark.parametrize(
    ("prediction", "truth", "exact", "overlap"),
    [
        ("The Eiffel Tower!", "eiffel  tower", 1, 1),
        ("a cat", "cat", 1, 1),
        ("another cat", "cat", 0, 2 / 3),  # "an" is an article, "another" is none
        ("in the old town", "old town of Oslo", 0, 2 * 2 / (3 + 4)),
        ("cat cat dog", "cat dog dog", 0, 2 / 3),  # words count as often as they occur
        ("Oslo", "Rome", 0, 0),
        ("", "Rome", 0, 0),
        ("Rome", "", 0, 0),
        ("", "", 1, 1),
        ("the", "", 1, 1),
        ("U.S.A.", "USA", 1, 1),
        ("caf\u00e9 \u2013 bar", "CAF\u00c9 \u2013 bar", 1, 1),  # a dash that is not ASCII stays a word
    ],
)
def test_scores_by_hand(prediction, truth, exact, overlap):
    assert exact_match(prediction, truth) == exact
    assert f1(prediction, truth) == pytest.approx(overlap, abs=1e-15)


def test_articles_leave_as_whole_words():
    assert normalised("An apple, the a-team and Theo") == "apple ateam and theo"


def test_score_takes_the_best_answer_and_splits_by_answerability():
    def example(ident, *texts):
        return Example(ident, "?", "", tuple(Answer(text, 0) for text in texts))

    examples = [example("a", "old town of Rome", "Rome"), example("b", "Lima"), example("c"), example("d")]
    found = score(examples, {"a": "rome", "b": "in Lima", "c": "", "d": "Oslo"})
    assert found == pytest.approx(
        {
            "exact": 2 / 4,
            "f1": (1 + 2 / 3 + 1 + 0) / 4,
            "has_answer_exact": 1 / 2,
            "has_answer_f1": (1 + 2 / 3) / 2,
            "no_answer_accuracy": 1 / 2,
        }
    )
    assert set(score(examples[:2], {"a": "", "b": ""})) == {"exact", "f1"}
