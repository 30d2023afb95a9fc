"""How well a token classifier answers the labels of words: tokens counted one by one, and whole entities."""

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
    """Sums over batches, and what they mean over those of all ranks.

    Entities are cut out as conlleval does (package seqeval), and one counts as found where kind, begin and end are
    right. They are left out where labels do not spell them, or where the package is not installed.

    Args:
        names: number of each label -> its name, as `id2label` of the model's config.
        device: of the logits.
    """

    def __init__(self, names: Mapping[int, str], device: torch.device) -> None:
        self.names = [names[number] for number in range(len(names))]
        self.counts = torch.zeros(len(names), len(names), dtype=torch.float64, device=device)
        self.entities = self.counts.new_zeros(3)
        """Found, said by the model, and labelled; NaN: not counted."""
        if not spell_entities(self.names) or lacks_package():
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
        """`compared_counts`, and label_entity_f1, micro-averaged over the kinds of entities. Every rank calls it."""
        found, said, labelled = ranks.total(self.entities).tolist()
        measured = compared_counts(ranks.total(self.counts))
        if measured and said + labelled > 0:
            measured["label_entity_f1"] = 2 * found / (said + labelled)
        return measured

    def _entities(self, logits: Tensor, batch: Batch) -> Tensor:
        has_label = ~batch.labels[:, 0].isnan()
        texts = (batch.target_index // batch.input_ids.shape[1])[has_label].tolist()
        labelled = entities_of(batch.labels[has_label, 0].long().tolist(), texts, self.names)
        said = entities_of(logits[has_label].argmax(-1).tolist(), texts, self.names)
        return self.entities.new_tensor([len(labelled & said), len(said), len(labelled)])


def entities_of(labels: list[int], texts: list[int], names: list[str]) -> set[tuple[str, int, int]]:
    """(kind, first, last) of each entity, places among all tokens where one that is no entity ends each text.

    Args:
        labels: number of the label of each labelled token.
        texts: number of each one's text; those of one text stand together.
        names: number of a label -> name.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    of_text = itertools.groupby(zip(texts, labels, strict=True), key=operator.itemgetter(0))
    return set(get_entities([[names[label] for _, label in pairs] for _, pairs in of_text]))


def lacks_package() -> bool:
    """Whether entities cannot be cut out here."""
    return importlib.util.find_spec("seqeval") is None


def spell_entities(names: Iterable[str]) -> bool:
    """Whether labels say of a token what part of an entity it is."""
    kinds = {name for name in names if name != OUTSIDE}
    return bool(kinds) and all(name.startswith(_PREFIXES) for name in kinds)
