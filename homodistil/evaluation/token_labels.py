"""How well a token classifier predicts the labels of words, by tokens and by whole entities."""

from __future__ import annotations

import importlib.util
import itertools
import operator
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from homodistil.data.batch import Batch
from homodistil.distributed import ranks
from homodistil.evaluation.labels import compared_counts, label_counts

OUTSIDE = "O"
_PREFIXES = ("B-", "I-", "E-", "S-")
"""Of a label: its token begins, continues, ends or is an entity (CoNLL-2003; IOB1, IOB2, IOBES)."""


class TokenLabels:
    """Counts over batches, and the measures that follow from those of all ranks.

    Entities are extracted as conlleval does (package seqeval); one is correct where its type, first and last token are.
    They are not counted where labels do not name parts of entities, or where the package is not installed.

    Args:
        names: number of each label -> its name, as `id2label` of the model's config.
        device: of the logits.
    """

    def __init__(self, names: Mapping[int, str], device: torch.device) -> None:
        self.names = [names[number] for number in range(len(names))]
        self.counts = torch.zeros(len(names), len(names), dtype=torch.float64, device=device)
        self.entities = self.counts.new_zeros(3)
        """Numbers of correct, predicted and labelled entities; NaN: not counted."""
        if not name_entities(self.names) or seqeval_is_missing():
            self.entities += torch.nan

    def add(self, logits: Tensor, batch: Batch) -> None:
        """Count a batch that has labels.

        Args:
            logits: (M, L), of the rows `batch.target_index`.
        """
        self.counts += label_counts(logits, batch.labels)
        if not self.entities.isnan().any():
            self.entities += self._entities(logits, batch)

    def measures(self) -> dict[str, float]:
        """`compared_counts`, and label_entity_f1, micro-averaged over the types of entities. Every rank calls it."""
        correct, predicted, labelled = ranks.total(self.entities).tolist()
        measured = compared_counts(ranks.total(self.counts))
        if measured and predicted + labelled > 0:
            measured["label_entity_f1"] = 2 * correct / (predicted + labelled)
        return measured

    def _entities(self, logits: Tensor, batch: Batch) -> Tensor:
        has_label = ~batch.labels[:, 0].isnan()
        texts = (batch.target_index // batch.input_ids.shape[1])[has_label].tolist()
        labelled = entities_of(batch.labels[has_label, 0].long().tolist(), texts, self.names)
        predicted = entities_of(logits[has_label].argmax(-1).tolist(), texts, self.names)
        return self.entities.new_tensor([len(labelled & predicted), len(predicted), len(labelled)])


def entities_of(labels: list[int], texts: list[int], names: list[str]) -> set[tuple[str, int, int]]:
    """(type, first, last) of each entity. Positions count all labelled tokens, and one more behind each text, so that
    no entity goes on into the next.

    Args:
        labels: number of the label of each labelled token.
        texts: number of each one's text; those of one text stand together.
        names: number of a label -> name.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    of_text = itertools.groupby(zip(texts, labels, strict=True), key=operator.itemgetter(0))
    return set(get_entities([[names[label] for _, label in pairs] for _, pairs in of_text]))


def seqeval_is_missing() -> bool:
    """Whether the package that extracts entities is not installed."""
    return importlib.util.find_spec("seqeval") is None


def name_entities(names: Iterable[str]) -> bool:
    """Whether every label but O says which part of an entity a token is."""
    kinds = {name for name in names if name != OUTSIDE}
    return bool(kinds) and all(name.startswith(_PREFIXES) for name in kinds)
