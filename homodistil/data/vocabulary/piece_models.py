"""The `model` section of a tokenizer.json: its pieces, what has to stay beside them, and the section with fewer.

WordPiece takes the longest piece that fits, byte-pair encoding merges neighbours in the order in which merges were
learned, and a unigram model takes the pieces with the largest sum of scores. In each, a text whose pieces all stay is
segmented as before; one that needs a removed piece falls back to shorter ones, in the end to single characters or
bytes, which is why these stay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from homodistil.errors import UserError

FIELD = "student.vocab"
_ASCII = frozenset(map(chr, range(33, 127)))
"""Characters that stay even if the text has none of them."""


class PieceModel(ABC):
    """Pieces and their ids. Added tokens are not among them, unless the section lists them as well."""

    def __init__(self, section: Mapping[str, Any]) -> None:
        self.section = section
        self.ids = self._ids()
        """Piece -> id."""

    @abstractmethod
    def _ids(self) -> dict[str, int]: ...

    @property
    def unknown(self) -> str | None:
        """The piece that stands for what no piece matches; None: there is none."""
        return self.section.get("unk_token")

    @abstractmethod
    def fallback(self, used: Iterable[str]) -> set[str]:
        """Pieces that every text of the characters of `used` can be made of, as far as the model has them."""

    def parts(self, piece: str) -> set[str]:
        """Pieces without which `piece` would never be made."""
        return set()

    @abstractmethod
    def cut(self, new_ids: Mapping[str, int]) -> dict[str, Any]:
        """The section with the pieces of `new_ids` alone, under these ids."""

    def _vocabulary(self, new_ids: Mapping[str, int]) -> dict[str, int]:
        return {piece: new_ids[piece] for piece in self.ids if piece in new_ids}


class WordPieces(PieceModel):
    """BERT's: pieces inside a word begin with ##."""

    def _ids(self) -> dict[str, int]:
        return dict(self.section["vocab"])

    def fallback(self, used: Iterable[str]) -> set[str]:
        inside = self.section["continuing_subword_prefix"]
        characters = _ASCII.union(*(piece.removeprefix(inside) for piece in used))
        return {form for c in characters for form in (c, f"{inside}{c}") if form in self.ids}

    def cut(self, new_ids: Mapping[str, int]) -> dict[str, Any]:
        return {**self.section, "vocab": self._vocabulary(new_ids)}


class MergedPieces(PieceModel):
    """Byte-pair encoding, of bytes written as characters (GPT-2's), or of characters with bytes as a fallback."""

    def __init__(self, section: Mapping[str, Any], of_bytes: bool) -> None:
        super().__init__(section)
        self._of_bytes = of_bytes
        self._merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in section["merges"]]
        self._ranks = {pair: rank for rank, pair in enumerate(self._merges)}

    def _ids(self) -> dict[str, int]:
        return dict(self.section["vocab"])

    def fallback(self, used: Iterable[str]) -> set[str]:
        if self._of_bytes:
            return set(ByteLevel.alphabet()) & self.ids.keys()
        return _bytes_and_characters(self.section, used, self.ids)

    def parts(self, piece: str) -> set[str]:
        """All that is merged on the way to it."""
        if _is_byte(piece):
            return set()
        symbols, made = list(piece), set(piece)
        while ranked := [(self._ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in self._ranks]:
            _, first = min(ranked)
            symbols[first : first + 2] = [symbols[first] + symbols[first + 1]]
            made.add(symbols[first])
        return made & self.ids.keys()

    def cut(self, new_ids: Mapping[str, int]) -> dict[str, Any]:
        vocabulary = self._vocabulary(new_ids)
        merges = [[a, b] for a, b in self._merges if {a, b, a + b} <= vocabulary.keys()]
        return {**self.section, "vocab": vocabulary, "merges": merges}


class ScoredPieces(PieceModel):
    """A unigram model (SentencePiece): its list of pieces with scores is in the order of ids."""

    def _ids(self) -> dict[str, int]:
        return {piece: i for i, (piece, _) in enumerate(self.section["vocab"])}

    @property
    def unknown(self) -> str | None:
        number = self.section.get("unk_id")
        return None if number is None else self.section["vocab"][number][0]

    def fallback(self, used: Iterable[str]) -> set[str]:
        # The library scores an unknown character by the lowest of all scores.
        lowest = min(self.section["vocab"], key=lambda entry: entry[1])[0]
        return _bytes_and_characters(self.section, used, self.ids) | {lowest}

    def cut(self, new_ids: Mapping[str, int]) -> dict[str, Any]:
        kept = [entry for entry in self.section["vocab"] if entry[0] in new_ids]
        unknown = None if self.unknown is None else new_ids[self.unknown]
        return {**self.section, "vocab": kept, "unk_id": unknown}


def piece_model(content: Mapping[str, Any], name: str) -> PieceModel:
    """The pieces of a tokenizer.json.

    Args:
        content: of the file.
        name: of the tokenizer's class, for messages.

    Raises:
        UserError: a model of another kind, or one with settings that are not supported.
    """
    section = content["model"]
    kind = section.get("type")
    unsupported = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if section.get(key)]
    if kind == "WordPiece":
        return WordPieces(section)
    if kind == "BPE" and not unsupported:
        is_byte_level = any(_has_byte_level(content.get(part)) for part in ("pre_tokenizer", "normalizer"))
        return MergedPieces(section, is_byte_level)
    if kind == "Unigram":
        return ScoredPieces(section)
    what = f"{kind} with {' and '.join(unsupported)}" if kind == "BPE" else str(kind)
    raise UserError(
        f"{FIELD}: the teacher's tokenizer ({name}) is a {what} model, allowed are WordPiece, Unigram, and BPE without "
        f"dropout, prefix and suffix; set {FIELD}=all"
    )


def _bytes_and_characters(section: Mapping[str, Any], used: Iterable[str], ids: Mapping[str, int]) -> set[str]:
    of_bytes = {piece for piece in ids if _is_byte(piece)} if section.get("byte_fallback") else set()
    characters = _ASCII.union(*(piece for piece in used if piece not in of_bytes))
    return of_bytes | (characters & ids.keys())


def _is_byte(piece: str) -> bool:
    """<0x00> .. <0xFF>, what SentencePiece calls its bytes."""
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _has_byte_level(part: Any) -> bool:
    """Whether a step of a tokenizer, or one inside of it, writes bytes as characters."""
    if isinstance(part, Mapping):
        return part.get("type") == "ByteLevel" or any(map(_has_byte_level, part.values()))
    return isinstance(part, list) and any(map(_has_byte_level, part))
