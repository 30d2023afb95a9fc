"""A fast tokenizer with fewer pieces, numbered anew without gaps and in the same order, and its files."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from homodistil.data.tokenizer import read_tokenizer
from homodistil.data.vocabulary.choice import Size, choose
from homodistil.data.vocabulary.piece_models import FIELD, PieceModel, piece_model
from homodistil.errors import UserError

_FILE, _SETTINGS, _ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
_OLD_FILES = ("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
"""Of slow tokenizers: they hold the removed pieces, under the ids of before."""

_PARTS = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")
"""Of a tokenizer.json, which a class must leave as they are written."""


@dataclass(frozen=True)
class SmallerTokenizer:
    """What remains of a tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    """The whole one."""
    kept: list[int]
    """Ids that stay, ascending: the new id of `kept[i]` is i."""
    content: dict[str, Any]
    """Of the new tokenizer.json."""

    @functools.cached_property
    def new_ids(self) -> dict[int, int]:
        """Id of before -> new id."""
        return {old: new for new, old in enumerate(self.kept)}

    def write(self, folder: Path) -> PreTrainedTokenizerBase:
        """Write the files of the new tokenizer, and read them back.

        Raises:
            UserError: its class makes another tokenizer of them.
        """
        self.tokenizer.save_pretrained(folder)
        for name in _OLD_FILES:
            (folder / name).unlink(missing_ok=True)
        (folder / _FILE).write_text(json.dumps(self.content, ensure_ascii=False), encoding="utf-8")
        _edit(folder / _SETTINGS, self._with_new_settings)
        _edit(folder / _ADDED, lambda added: {token: self.new_ids[number] for token, number in added.items()})
        written = read_tokenizer(str(folder), FIELD)
        content = json.loads(written.backend_tokenizer.to_str())
        if any(content[part] != self.content[part] for part in _PARTS):
            raise UserError(
                f"{FIELD}: {type(self.tokenizer).__name__} makes another tokenizer of a smaller {_FILE}; allowed for "
                f"such a tokenizer is all; set {FIELD}=all"
            )
        return written

    def _with_new_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        added = settings.get("added_tokens_decoder")
        if not added:
            return settings
        return {**settings, "added_tokens_decoder": {str(self.new_ids[int(n)]): entry for n, entry in added.items()}}

    def _vocabulary(self) -> dict[str, int]:
        of_before = self.tokenizer.backend_tokenizer.get_vocab()
        return {piece: self.new_ids[number] for piece, number in of_before.items() if number in self.new_ids}


def cut_tokenizer(
    tokenizer: PreTrainedTokenizerBase, counts: np.ndarray, size: Size, fixed: Iterable[int] = ()
) -> SmallerTokenizer:
    """The tokenizer that remains once the other pieces are gone.

    Args:
        tokenizer: a fast one.
        counts: occurrences of each id in the text, int64, longer than the largest id.
        size: as in `choose`.
        fixed: ids that stay beside special and added tokens.

    Raises:
        UserError: a tokenizer that cannot be cut, or a size that it cannot have.
    """
    content, model = _read(tokenizer)
    names = {number: piece for piece, number in tokenizer.backend_tokenizer.get_vocab().items()}
    kept = choose(model, names, counts, _special(content) | (set(fixed) & names.keys()), size)
    new_ids = {old: new for new, old in enumerate(kept)}
    cut = _renumbered(content, new_ids) | {"model": model.cut({names[old]: new for old, new in new_ids.items()})}
    smaller = SmallerTokenizer(tokenizer, kept, cut)
    if Tokenizer.from_str(json.dumps(cut)).get_vocab() != smaller._vocabulary():
        raise UserError(
            f"{FIELD}: the ids of {type(tokenizer).__name__} cannot be numbered without gaps; allowed for such a "
            f"tokenizer is all; set {FIELD}=all"
        )
    return smaller


def check_cuttable(tokenizer: PreTrainedTokenizerBase, size: Size) -> None:
    """Raise `UserError` where `cut_tokenizer` would, whatever the text."""
    number_of_ids = 1 + max(tokenizer.get_vocab().values())
    cut_tokenizer(tokenizer, np.zeros(number_of_ids, dtype=np.int64), size)


def _read(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], PieceModel]:
    name = type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise UserError(
            f"{FIELD}: the teacher's tokenizer ({name}) is no fast one (with a {_FILE}), whose pieces could be taken "
            f"out; set {FIELD}=all"
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["truncation"] = content["padding"] = None  # left by earlier calls; they are settings of a call
    return content, piece_model(content, name)


def _special(content: Mapping[str, Any]) -> set[int]:
    """Ids of all added tokens, special or not, and of those that are put around a text."""
    ids = {token["id"] for token in content["added_tokens"]}
    _with_ids(content["post_processor"], lambda number: ids.add(number) or number)
    return ids


def _renumbered(content: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    added = [{**token, "id": new_ids[token["id"]]} for token in content["added_tokens"]]
    return {
        **content,
        "added_tokens": added,
        "post_processor": _with_ids(content["post_processor"], new_ids.__getitem__),
    }


def _with_ids(part: Any, new: Callable[[int], int]) -> Any:
    """A post-processor, or a part of one, with other ids: `ids` of templates, and pairs [token, id] of older kinds."""
    if isinstance(part, dict):
        return {
            key: [new(number) for number in value] if key == "ids" else _with_ids(value, new)
            for key, value in part.items()
        }
    if isinstance(part, list):
        if len(part) == 2 and isinstance(part[0], str) and type(part[1]) is int:
            return [part[0], new(part[1])]
        return [_with_ids(value, new) for value in part]
    return part


def _edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if path.exists():
        content = change(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
