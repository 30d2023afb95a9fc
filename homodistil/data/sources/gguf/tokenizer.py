"""The tokenizer of a GGUF file (byte-level BPE) as tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from homodistil.data.sources.gguf import metadata
from homodistil.data.sources.gguf.container import AGAIN, GgufFile
from homodistil.data.sources.gguf.model import token_id
from homodistil.data.sources.gguf.splitting import SPLITTINGS, Splitting
from homodistil.errors import UserError
from homodistil.models.checkpoint_files import first_line, short

_PREFIX = "tokenizer.ggml"
_MODEL = "gpt2"
"""Byte-level BPE, whosever tokenizer it is."""
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""Types of tokens; 1 is normal, 5 unused, 6 a byte."""


def write_tokenizer(file: GgufFile, folder: Path) -> None:
    """Both files of the tokenizer in `folder`.

    Raises:
        UserError: another kind of tokenizer, or a damaged one.
        OSError: `folder` cannot be written.
    """
    tokenizer = read_tokenizer(file)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    settings = json.dumps(_settings(file), ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(settings, encoding="utf-8")


def read_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer that the file describes. Raises `UserError`: another kind of tokenizer, or a damaged one."""
    splitting = _splitting(file)
    try:
        return _build(file, splitting)
    except UserError:
        raise
    except Exception as error:  # the library of tokenizers raises plain Exceptions
        raise UserError(f"{file.where}: is damaged (its tokenizer: {first_line(error)}); {AGAIN}") from None


def _build(file: GgufFile, splitting: Splitting) -> Tokenizer:
    tokenizer = Tokenizer(_bpe(file, splitting))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(splitting.steps))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(_added(file))
    bos = _special(file).get("bos_token")
    if bos is not None and metadata.flag(file, f"{_PREFIX}.add_bos_token", splitting.adds_bos):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def _splitting(file: GgufFile) -> Splitting:
    for key, allowed in ((f"{_PREFIX}.model", (_MODEL,)), (f"{_PREFIX}.pre", tuple(SPLITTINGS))):
        if (name := metadata.text(file, key)) not in allowed:
            raise UserError(
                f"{file.where}: found {key} {short(repr(name))}, allowed are {', '.join(allowed)}; give the model's "
                f"Hugging Face folder instead"
            )
    return SPLITTINGS[name]


def _bpe(file: GgufFile, splitting: Splitting) -> models.BPE:
    tokens, merges = (metadata.texts(file, f"{_PREFIX}.{name}") for name in ("tokens", "merges"))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise UserError(f"{file.where}: is damaged (a token twice); {AGAIN}")
    if wrong := [merge for merge in merges if merge.count(" ") != 1]:
        raise UserError(f"{file.where}: is damaged (the merge {short(repr(wrong[0]))}, expected two parts); {AGAIN}")
    return models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges], ignore_merges=splitting.ignore_merges)


def _added(file: GgufFile) -> list[AddedToken]:
    """What text is not cut through: control tokens, which decoding may skip, and those that a user added."""
    tokens, kinds = metadata.texts(file, f"{_PREFIX}.tokens"), metadata.integers(file, f"{_PREFIX}.token_type")
    if len(kinds) != len(tokens):
        raise UserError(f"{file.where}: is damaged ({len(tokens)} tokens with {len(kinds)} types); {AGAIN}")
    special = set(_special(file).values())
    return [
        AddedToken(token, special=kind != _USER_DEFINED or token in special, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) or token in special
    ]


def _special(file: GgufFile) -> dict[str, str]:
    """bos_token, eos_token, ... -> token, of those that the file names."""
    tokens = metadata.texts(file, f"{_PREFIX}.tokens")
    ids = {name: token_id(file, name) for name in ("bos", "eos", "padding", "unknown")}
    ours = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    return {ours[name]: tokens[i] for name, i in ids.items() if i is not None}


def _settings(file: GgufFile) -> dict[str, Any]:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is
        "model_max_length": metadata.integer(file, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        **_special(file),
    }
    template = metadata.text(file, "tokenizer.chat_template", default=None)
    return settings if template is None else {**settings, "chat_template": template}
