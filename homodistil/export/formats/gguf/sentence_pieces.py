"""SentencePiece's BPE as the metadata of a GGUF file: tokens with scores where transformers has merges.

llama.cpp joins the two neighbours whose joint token has the highest score, the leftmost first; the tokenizers library
those whose merge is the earliest. Both are the same where the merges list every way to make a token, one token after
the other, as SentencePiece's converters do: a token's score is then minus the place of its merges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from gguf import GGUFValueType, TokenType

from homodistil.errors import UserError
from homodistil.export.formats.gguf.architectures import FIELD
from homodistil.export.formats.gguf.hyperparameters import Metadata
from homodistil.models.checkpoint_files import short

_SPACE = "▁"
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_BYTES = [f"<0x{number:02X}>" for number in range(256)]


def is_of_sentence_pieces(content: Mapping[str, Any]) -> bool:
    """Whether a BPE tokenizer writes what it does not know as bytes, <0x0A>, and not all text as letters for bytes."""
    return bool(content["model"].get("byte_fallback"))


def of_sentence_pieces(
    content: Mapping[str, Any], tokens: list[str], types: Sequence[TokenType]
) -> tuple[Metadata, list[str]]:
    """What llama.cpp needs beside the tokens, and the tokens; sets the types of bytes and the unknown token.

    Raises:
        UserError: spaces are written in another way, or merges and scores would join in another order.
    """
    prepends, model = _prepends(content), content["model"]
    if missing := [token for token in _BYTES if token not in model["vocab"]]:
        raise UserError(f"{FIELD}: the tokenizer lacks the byte {missing[0]}, llama.cpp needs all; take another format")
    plain = {token for token, kind in zip(tokens, types, strict=True) if kind is TokenType.NORMAL} - set(_BYTES)
    scores = _scores(model, plain)
    for number, token in enumerate(tokens):
        if token in _BYTES:
            types[number] = TokenType.BYTE
        elif token == model["unk_token"]:
            types[number] = TokenType.UNKNOWN
    described: Metadata = {
        "model": (GGUFValueType.STRING, "llama"),
        "pre": (GGUFValueType.STRING, "default"),
        "scores": (GGUFValueType.ARRAY, [scores.get(token, 0.0) for token in tokens]),
        "add_space_prefix": (GGUFValueType.BOOL, prepends),
    }
    return described, tokens


def _prepends(content: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front. Raises `UserError` for other steps than SentencePiece's."""
    steps = (content["normalizer"], content["pre_tokenizer"])
    if steps == ({"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]}, None):
        return True
    if steps in ((_REPLACE, None), (_REPLACE, _SPLIT)):
        return False
    raise UserError(
        f"{FIELD}: the tokenizer writes spaces by {short(json.dumps(steps))}, which is none of SentencePiece's ways "
        f"that llama.cpp has; take another format"
    )


def _scores(model: Mapping[str, Any], plain: set[str]) -> dict[str, float]:
    """Token -> minus the place of its first merge; tokens that are never merged are not in it.

    Args:
        plain: tokens that are neither added nor bytes.
    """
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    joint = ["".join(pair) for pair in pairs]
    expected = {
        (token[:at], token[at:])
        for token in plain
        for at in range(1, len(token))
        if token[:at] in plain and token[at:] in plain
    }
    changes = sum(before != after for before, after in pairwise(joint)) + bool(joint)
    if set(pairs) != expected or changes != len(set(joint)):
        raise UserError(
            f"{FIELD}: the tokenizer's merges are not those of a SentencePiece model (every way to make a token, token "
            f"by token), which is what llama.cpp joins by; take another format"
        )
    return {token: -float(place) for place, token in reversed(list(enumerate(joint)))}
