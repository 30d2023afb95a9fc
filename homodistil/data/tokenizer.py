"""Reads the tokenizer of a checkpoint, and refuses it where transformers would silently replace missing parts.

The library builds an empty tokenizer for a folder without one, adds [MASK] to a vocabulary that lacks it, and reads a
tokenizer.json of another model type as if it were of the configured class. Text would then become unknown tokens, or
ids without trained embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from homodistil.data.task import Task
from homodistil.errors import UserError
from homodistil.models.checkpoint_files import first_line, local_folder, read_json, short

MAX_UNKNOWN = 0.9
"""Maximum share of unknown tokens in a sample of text. A tokenizer for the language of the text is far below it."""
SPECIAL_TOKENS = ("mask_token", "pad_token", "cls_token", "sep_token")
_FILE, _WORDS, _SETTINGS = "tokenizer.json", "vocab.txt", "tokenizer_config.json"
_JSON_FILES = (_FILE, _SETTINGS, "special_tokens_map.json", "added_tokens.json")
# Vocabulary files of further tokenizer classes of the library.
_OTHERS = ("vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "bpe.codes")
_SAMPLE_WORDS = 200
_FEWEST_TOKENS = 20
"""The share of unknown tokens is not checked for fewer tokens."""


def read_tokenizer(name: str, field: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub name. Custom code in the folder is never run.

    Args:
        field: the option that `name` was given with, for messages: "teacher.name" or "--checkpoint".

    Raises:
        UserError: there is no tokenizer, it is damaged, needs custom code, or its file does not match its class.
    """
    folder = local_folder(name, field)
    if folder is not None:
        _check_files(folder, field)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder or name), trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise UserError(
            f"{field}: no usable tokenizer at {short(name)!r} ({first_line(error)}); give the files of the tokenizer "
            f"that the model was trained with ({_FILE}, {_SETTINGS})"
        ) from None
    if folder is not None and (folder / _FILE).is_file():
        _check_same(tokenizer, folder / _FILE, field)
    return tokenizer


def _check_files(folder: Path, field: str) -> None:
    for name in _JSON_FILES:
        if (folder / name).exists() and read_json(folder / name, field).get("auto_map"):
            raise UserError(
                f"{field}: {folder / name} has auto_map, a tokenizer with code of its own, which is never run; give "
                f"one of a stock class"
            )
    if not any((folder / name).is_file() for name in (_FILE, _WORDS, *_OTHERS)):
        raise UserError(
            f"{field}: {short(str(folder))!r} has no tokenizer (no {_FILE}, no {_WORDS}); put the one that the model "
            f"was trained with beside its weights"
        )


def _check_same(tokenizer: PreTrainedTokenizerBase, file: Path, field: str) -> None:
    """Raise `UserError` unless the model type and the special tokens of `tokenizer` are those of `file`."""
    stored = tokenizers.Tokenizer.from_file(str(file))  # cannot fail: the library has just read the file
    in_file, as_read = (type(one.model).__name__ for one in (stored, tokenizer.backend_tokenizer))
    if in_file != as_read:
        raise UserError(
            f"{field}: {file} holds a {in_file} model, which {_SETTINGS} (or the model's type) has read as {as_read} "
            f"by {type(tokenizer).__name__}; give the tokenizer that the model was trained with, or set its "
            f"tokenizer_class in {_SETTINGS}"
        )
    known = stored.get_vocab(with_added_tokens=True)
    settings = read_json(file.with_name(_SETTINGS), field) if file.with_name(_SETTINGS).exists() else {}
    added = settings.get("added_tokens_decoder") or {}
    known |= {entry["content"]: int(i) for i, entry in added.items() if isinstance(entry, dict) and "content" in entry}
    made_up = [n for n in SPECIAL_TOKENS if (token := getattr(tokenizer, n, None)) is not None and token not in known]
    if made_up:
        names = ", ".join(f"{name} {short(str(getattr(tokenizer, name)))!r}" for name in made_up)
        raise UserError(
            f"{field}: the vocabulary in {file} lacks {names}, so no embedding was trained for it; give the tokenizer "
            f"that the model was trained with"
        )


def check_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str) -> None:
    """Raise `UserError` if an id is not below `vocab_size`, the number of embeddings. `where` begins the message."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if len(tokenizer) > vocab_size or largest >= vocab_size:
        raise UserError(
            f"{where} has {len(tokenizer)} tokens, the model {vocab_size} embeddings, and its ids go up to {largest}; "
            f"use the tokenizer that the model was trained with"
        )


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, task: Task, where: str) -> None:
    """Raise `UserError` where a token that the task needs is missing, or mask or pad means something else as well."""
    names = (*SPECIAL_TOKENS, *task.special_tokens, "unk_token")
    ids = {name: getattr(tokenizer, f"{name}_id", None) for name in names}
    if missing := [name for name in task.special_tokens if ids[name] is None]:
        raise UserError(f"{where} has no {', '.join(missing)}; use the tokenizer of {task.model}")
    for name in (name for name in ("mask_token", "pad_token") if name in task.special_tokens):
        if same := [other for other, token_id in ids.items() if other != name and token_id == ids[name]]:
            raise UserError(
                f"{where} has one token, {getattr(tokenizer, name)!r}, as {name} and as {same[0]}; give each a token "
                f"of its own in {_SETTINGS}, those that the model was trained with"
            )


def check_words(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise `UserError` if the tokenizer reads words of its vocabulary as unknown: all text would be unknown."""
    special = set(tokenizer.all_special_tokens)
    words = [word for word in tokenizer.get_vocab() if word not in special and any(map(str.isalpha, word))]
    step = -(-len(words) // _SAMPLE_WORDS) or 1
    sample = [word.removeprefix("##").strip("▁Ġ") for word in sorted(words)[::step]]
    ids = tokenizer(" ".join(sample), add_special_tokens=False, verbose=False)["input_ids"] if sample else []
    if not ids or unknown_share(ids, tokenizer.unk_token_id) > MAX_UNKNOWN:
        result = f"reads {len(sample)} words of its own vocabulary as unknown" if sample else "knows no words"
        raise UserError(
            f"{where} {result}: all text would become {tokenizer.unk_token!r}; use the tokenizer that the model was "
            f"trained with"
        )


def unknown_share(ids: Sequence[int], unknown: int | None) -> float:
    """Share of the token `unknown` in `ids`, in [0, 1]; 0 if the tokenizer has no unknown token (None)."""
    return sum(i == unknown for i in ids) / len(ids) if unknown is not None and len(ids) else 0.0


def check_text_is_known(ids: Sequence[int], unknown: int | None, source: str) -> None:
    """Raise `UserError` if `ids`, tokens from the start of `source`, are nearly all unknown."""
    if len(ids) >= _FEWEST_TOKENS and (share := unknown_share(ids, unknown)) > MAX_UNKNOWN:
        raise UserError(
            f"data.sources: {source!r} is not in the language of the teacher's tokenizer: {share:.0%} of the first "
            f"{len(ids)} tokens are unknown to it; give text that it was made for, or another teacher"
        )
