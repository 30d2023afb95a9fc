"""Which pieces stay: all that the text uses, or the most frequent ones, and what these cannot be without."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np

from homodistil.data.vocabulary.piece_models import FIELD, PieceModel
from homodistil.errors import UserError

ALL, CORPUS = "all", "corpus"
Size = int | Literal["corpus"]


def choose(model: PieceModel, names: dict[int, str], counts: np.ndarray, fixed: Iterable[int], size: Size) -> list[int]:
    """Ids that stay, ascending.

    Args:
        names: id -> piece, of all pieces and added tokens.
        counts: occurrences of each id, int64, at least as long as the largest id.
        fixed: ids that stay in any case: added tokens and those that somebody names.
        size: number of pieces, or "corpus": as many as have a count.

    Raises:
        UserError: `size` is smaller than what has to stay, or larger than the vocabulary.
    """
    ids, fixed = {name: number for number, name in names.items()}, set(fixed)
    used = [number for number in names if counts[number] > 0 and number not in fixed]

    def with_parts(numbers: Iterable[int]) -> set[int]:
        """Closed: what a part is made of is among the parts of the whole."""
        numbers = set(numbers)
        return numbers.union(*({ids[part] for part in model.parts(names[n])} for n in numbers - fixed))

    stays = with_parts(fixed | {ids[piece] for piece in model.fallback(names[number] for number in used)})
    if model.unknown in ids:
        stays.add(ids[model.unknown])
    if size == CORPUS:
        return sorted(stays | with_parts(used))
    _check(size, len(stays), len(names))
    for number in sorted(names.keys() - stays, key=lambda number: (-counts[number], number)):
        if len(stays) == size:
            break
        more = with_parts([number]) - stays
        if len(stays) + len(more) <= size:
            stays |= more
    return sorted(stays)


def _check(size: int, smallest: int, largest: int) -> None:
    if not smallest <= size <= largest:
        raise UserError(
            f"{FIELD}: found {size}, allowed for this teacher and text are {smallest} (special tokens, and the "
            f"characters or bytes that every text can be made of) .. {largest} (all); set it to one of them"
        )
