"""Entities in a token classifier's answers: counted by hand, seqeval's F1 of whole lists, and labels of no entity."""

from __future__ import annotations

import pytest
import torch

from homodistil.data.batch import Batch, LossCounts
from homodistil.evaluation import token_labels
from homodistil.evaluation.token_labels import TokenLabels, entities_of, name_entities

NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
DEVICE = torch.device("cpu")


def labels_of(num_texts: int, num_tokens: int, seed: int) -> tuple[Batch, torch.Tensor]:
    """Rows that are two thirds of all tokens, of which a quarter has no label, and logits that are often right."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.ones(num_texts, num_tokens, dtype=torch.int64)
    (rows,) = torch.nonzero(torch.rand(ids.numel(), generator=draw) < 2 / 3, as_tuple=True)
    numbers = torch.randint(len(NAMES), (len(rows),), generator=draw)
    logits = torch.randn(len(rows), len(NAMES), generator=draw) + 3 * torch.eye(len(NAMES))[numbers]
    labels = numbers.float().masked_fill(torch.rand(len(rows), generator=draw) < 1 / 4, torch.nan)
    batch = Batch(ids, ids, rows, ids.flatten()[rows], rows, LossCounts(0.0, 0.0, 0.0), labels=labels[:, None])
    return batch, logits


def measured(pairs, names=NAMES) -> dict[str, float]:
    sums = TokenLabels(dict(enumerate(names)), DEVICE)
    for batch, logits in pairs:
        sums.add(logits, batch)
    return sums.measures()


def test_entities_by_hand():
    """One is two tokens long, one begins where another of its kind ends, one begins without a B, and none goes on into
    the next text."""
    pytest.importorskip("seqeval")
    labels = [1, 2, 0, 3, 3, 4, 2, 2]
    texts = [0, 0, 0, 0, 0, 0, 1, 1]
    assert entities_of(labels, texts, NAMES) == {("PER", 0, 1), ("LOC", 3, 3), ("LOC", 4, 5), ("PER", 7, 8)}
    assert len(entities_of([1, 2, 2], [0, 0, 1], NAMES)) == 2 and not entities_of([0, 0], [0, 1], NAMES)


@pytest.mark.parametrize("num_texts", [1, 7])
def test_f1_is_that_of_seqeval_over_all_batches(num_texts):
    seqeval = pytest.importorskip("seqeval.metrics")
    pairs = [labels_of(num_texts, num_tokens, seed=num_tokens) for num_tokens in (5, 13, 64)]
    true, said = [], []
    for batch, logits in pairs:
        for text in range(num_texts):
            chosen = (batch.target_index // batch.input_ids.shape[1] == text) & ~batch.labels[:, 0].isnan()
            true.append([NAMES[int(number)] for number in batch.labels[chosen, 0]])
            said.append([NAMES[number] for number in logits[chosen].argmax(-1)])
    expected = seqeval.f1_score(true, said)
    assert 0.2 < expected < 0.98 and measured(pairs)["label_entity_f1"] == pytest.approx(expected)


def test_labels_of_no_entity_have_no_such_measure(monkeypatch):
    pairs = [labels_of(3, 9, seed=0)]
    parts_of_speech = ["NOUN", "VERB", "ADJ", "DET", "O"]
    assert measured(pairs, parts_of_speech).keys() == {"label_accuracy", "label_macro_f1"}
    assert not name_entities(parts_of_speech) and not name_entities(["O"]) and name_entities(["O", "S-X", "E-X"])
    monkeypatch.setattr(token_labels, "seqeval_is_missing", lambda: True)
    assert measured(pairs).keys() == {"label_accuracy", "label_macro_f1"}


def test_without_labels_nothing_is_measured():
    batch, logits = labels_of(3, 9, seed=0)
    assert measured([(batch._replace(labels=torch.full_like(batch.labels, torch.nan)), logits)]) == {}
