"""What the tokenizer of a GGUF file makes of a text, by the steps of llama.cpp; special tokens are not added."""

from __future__ import annotations

import re
from collections.abc import Callable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from homodistil.data.sources.gguf import metadata
from homodistil.data.sources.gguf.container import GgufFile
from homodistil.data.sources.gguf.tokenizer import read_tokenizer
from homodistil.errors import UserError
from homodistil.export.formats.gguf.vocabulary import PHANTOM_SPACE, PREFIX

_CONTROL, _USER_DEFINED = 3, 4
Encode = Callable[[str], list[int]]
"""Text -> token ids."""


def encoder_of(file: GgufFile) -> Encode:
    """Raises `UserError`: a damaged file, or a tokenizer of another kind than are written."""
    kind = metadata.text(file, f"{PREFIX}model")
    if kind not in _ENCODERS:
        raise UserError(f"{file.where}: found tokenizer {kind!r}, allowed are {', '.join(_ENCODERS)}")
    return _ENCODERS[kind](file)


def _byte_level(file: GgufFile) -> Encode:
    tokenizer = read_tokenizer(file)
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _word_pieces(file: GgufFile) -> Encode:
    tokens, types = _tokens(file)
    special = {token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL}
    spelt = {
        token if token in special else token[1:] if token.startswith(PHANTOM_SPACE) else f"##{token}": number
        for number, token in enumerate(tokens)
    }
    unknown = tokens[metadata.integer(file, f"{PREFIX}unknown_token_id", low=0, high=len(tokens) - 1)]
    tokenizer = Tokenizer(models.WordPiece(spelt, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(sorted(special))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _sentence_pieces(file: GgufFile) -> Encode:
    """Joins the two neighbours with the highest score of all, the leftmost first, until none are left."""
    tokens, types = _tokens(file)
    ids, scores = {token: number for number, token in enumerate(tokens)}, file.metadata[f"{PREFIX}scores"]
    whole = [token for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    whole = sorted(whole, key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, whole))})") if whole else re.compile("(?!)")
    prefix = " " if metadata.flag(file, f"{PREFIX}add_space_prefix", True) else ""

    def join(pieces: list[str]) -> list[str]:
        while True:
            joint = [ids.get(left + right) for left, right in zip(pieces, pieces[1:], strict=False)]
            candidates = [(-scores[number], at) for at, number in enumerate(joint) if number is not None]
            if not candidates:
                return pieces
            at = min(candidates)[1]
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]

    def number(piece: str) -> list[int]:
        return [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]

    def encode(text: str) -> list[int]:
        numbers = []
        for part in filter(None, pattern.split(prefix + text)):
            pieces = [part] if part in whole else join(list(part.replace(" ", PHANTOM_SPACE)))
            numbers += [each for piece in pieces for each in number(piece)]
        return numbers

    return encode


def _tokens(file: GgufFile) -> tuple[list[str], list[int]]:
    return metadata.texts(file, f"{PREFIX}tokens"), metadata.integers(file, f"{PREFIX}token_type")


_ENCODERS = {"gpt2": _byte_level, "bert": _word_pieces, "llama": _sentence_pieces}
"""By tokenizer.ggml.model."""
