"""A tokenizer as the metadata of a GGUF file: byte-level BPE and WordPiece; sentence_pieces.py has the third kind.

Nothing is guessed: a tokenizer whose steps llama.cpp does not have is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gguf import GGUFValueType, TokenType
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from homodistil.data.sources.gguf.splitting import SPLITTINGS, Splitting
from homodistil.errors import UserError
from homodistil.export.formats.gguf.architectures import FIELD
from homodistil.export.formats.gguf.hyperparameters import Metadata
from homodistil.export.formats.gguf.sentence_pieces import is_of_sentence_pieces, of_sentence_pieces
from homodistil.models.checkpoint_files import short

PREFIX = "tokenizer.ggml."
PHANTOM_SPACE = "▁"
"""llama.cpp's mark of a WordPiece that begins a word; transformers marks all others, by ##."""
_WORD_PIECE_PREFIX = "##"
_PROBE = "a"
_IDS = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "cls": "cls",
    "mask": "mask",
}
"""Special token -> its name in a file, where one is misspelt."""
_SIDES = (("bos", "add_bos_token"), ("eos", "add_eos_token"))


def vocabulary(tokenizer: PreTrainedTokenizerBase, num_embeddings: int, token_types: int | None) -> Metadata:
    """All metadata that begin with "tokenizer.".

    Args:
        num_embeddings: rows of the embeddings; those behind the last token are tokens that no text has.
        token_types: kinds of sequences that an encoder tells apart; None: a decoder.

    Raises:
        UserError: no fast tokenizer, or one that llama.cpp does not have.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{FIELD}: {type(tokenizer).__name__} is no fast tokenizer; give a folder with tokenizer.json")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, types = _tokens(tokenizer, content, num_embeddings)
    described, tokens = _of_kind(content, tokens, types)
    described |= {
        "tokens": (GGUFValueType.ARRAY, tokens),
        "token_type": (GGUFValueType.ARRAY, [int(kind) for kind in types]),
        **_special(tokenizer),
    }
    if token_types is not None:
        described["token_type_count"] = (GGUFValueType.UINT32, token_types)
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, Mapping) else template
    of_chat = {"tokenizer.chat_template": (GGUFValueType.STRING, template)} if template else {}
    return {PREFIX + key: value for key, value in described.items()} | of_chat


def _tokens(
    tokenizer: PreTrainedTokenizerBase, content: Mapping[str, Any], num_embeddings: int
) -> tuple[list[str], list[TokenType]]:
    """By id: every token, and what llama.cpp does with it."""
    tokens = [f"[PAD{number}]" for number in range(num_embeddings)]
    types = [TokenType.UNUSED] * num_embeddings
    for token, number in tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True).items():
        tokens[number], types[number] = token, TokenType.NORMAL
    for added in content["added_tokens"]:
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return tokens, types


def _of_kind(content: Mapping[str, Any], tokens: list[str], types: Sequence[TokenType]) -> tuple[Metadata, list[str]]:
    """What the kind of tokenizer needs beside its tokens, and the tokens as llama.cpp spells them."""
    model = content["model"]
    if model["type"] == "WordPiece":
        _check_word_pieces(content)
        return _named("bert", "default"), _with_phantom_spaces(tokens, types)
    if model["type"] == "BPE" and is_of_sentence_pieces(content):
        return of_sentence_pieces(content, tokens, types)
    if model["type"] == "BPE":
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        return _named("gpt2", _pre_tokenizer(content)) | {"merges": (GGUFValueType.ARRAY, merges)}, tokens
    raise UserError(
        f"{FIELD}: found a tokenizer of the kind {short(model['type'])}, allowed are byte-level and SentencePiece BPE, "
        f"and WordPiece; take another format"
    )


def _named(model: str, pre: str) -> Metadata:
    return {"model": (GGUFValueType.STRING, model), "pre": (GGUFValueType.STRING, pre)}


def _pre_tokenizer(content: Mapping[str, Any]) -> str:
    """llama.cpp's name for the way in which a byte-level tokenizer cuts text; a smaller vocabulary keeps its own."""
    if (normalizer := content["normalizer"]) not in (None, {"type": "NFC"}):
        raise UserError(f"{FIELD}: found normalizer {short(json.dumps(normalizer))}, llama.cpp has none beside NFC")
    steps, ignores = _flat(content["pre_tokenizer"]), content["model"].get("ignore_merges", False)
    for name, splitting in SPLITTINGS.items():
        if _flat_steps(splitting) == steps and splitting.ignore_merges == ignores:
            return name
    raise UserError(
        f"{FIELD}: the tokenizer cuts text by {short(json.dumps(content['pre_tokenizer']))} (ignore_merges "
        f"{json.dumps(ignores)}), which is none of {', '.join(SPLITTINGS)}; take another format"
    )


def _flat_steps(splitting: Splitting) -> list[dict[str, Any]]:
    return _flat(json.loads(pre_tokenizers.Sequence(list(splitting.steps)).__getstate__()))


def _flat(step: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer without what changes offsets alone."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for each in step["pretokenizers"] for inner in _flat(each)]
    return [{key: value for key, value in step.items() if key != "trim_offsets"}]


def _check_word_pieces(content: Mapping[str, Any]) -> None:
    """Raise `UserError` for what llama.cpp does not do: it lowers case, strips accents and cuts at ASCII symbols."""
    normalizer, pre = content["normalizer"] or {}, content["pre_tokenizer"] or {}
    expected = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True}
    actual = {name: normalizer.get(name) for name in expected}
    if actual != expected or normalizer.get("strip_accents") is False or pre.get("type") != "BertPreTokenizer":
        raise UserError(
            f"{FIELD}: found normalizer {short(json.dumps(normalizer))} and pre-tokenizer {short(json.dumps(pre))}, "
            f"llama.cpp reads WordPiece as an uncased BERT does; take another format"
        )
    if (prefix := content["model"]["continuing_subword_prefix"]) != _WORD_PIECE_PREFIX:
        raise UserError(f"{FIELD}: found pieces with {short(repr(prefix))} inside a word, llama.cpp knows ## alone")


def _with_phantom_spaces(tokens: Iterable[str], types: Iterable[TokenType]) -> list[str]:
    return [
        token
        if kind is TokenType.CONTROL
        else token.removeprefix(_WORD_PIECE_PREFIX)
        if token.startswith(_WORD_PIECE_PREFIX)
        else PHANTOM_SPACE + token
        for token, kind in zip(tokens, types, strict=True)
    ]


def _special(tokenizer: PreTrainedTokenizerBase) -> Metadata:
    """Ids of special tokens, and which of them stand around a text. Those are bos and eos to llama.cpp."""
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in _IDS}
    inner, whole = (tokenizer(_PROBE, add_special_tokens=added)["input_ids"] for added in (False, True))
    start = next((at for at in range(len(whole)) if whole[at : at + len(inner)] == inner), None)
    if start is None or start > 1 or len(whole) - start - len(inner) > 1:
        raise UserError(f"{FIELD}: the tokenizer makes {whole} of {_PROBE!r}, llama.cpp adds one token on a side")
    around = {"bos": whole[:start], "eos": whole[start + len(inner) :]}
    flags: Metadata = {key: (GGUFValueType.BOOL, bool(around[name])) for name, key in _SIDES}
    for name, added in around.items():
        if added and ids[name] not in (None, *added):
            raise UserError(
                f"{FIELD}: the tokenizer adds token {added[0]} to a text where its {name}_token is {ids[name]}, "
                f"llama.cpp adds {name}; take another format"
            )
        ids[name] = added[0] if added else ids[name]
    named: Metadata = {
        f"{_IDS[name]}_token_id": (GGUFValueType.UINT32, number) for name, number in ids.items() if number is not None
    }
    return named | flags
