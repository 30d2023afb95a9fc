"""What a GGUF file holds beside the weights, read and checked before the weights are loaded."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from homodistil.data.tokenizer import check_ids, read_tokenizer
from homodistil.errors import UserError
from homodistil.export.formats.gguf.architectures import FIELD, architecture_of
from homodistil.export.formats.gguf.hyperparameters import Metadata
from homodistil.export.formats.gguf.vocabulary import vocabulary
from homodistil.models.sentence_modules import read_sentence_modules


class Header(NamedTuple):
    """What a file holds beside the weights."""

    name: str
    """Of the model, for people."""
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Metadata
    """All keys that begin with "tokenizer."."""
    pooling: str | None = None
    """`PoolingMode` of a sentence embedder."""


def header_of(place: str, config: PretrainedConfig, has_head: bool, modules: str | None, name: str) -> Header:
    """Of a checkpoint.

    Args:
        place: folder or hub name of the Transformer and its tokenizer.
        modules: folder of sentence-transformers with its modules; None: it is no sentence embedder.

    Raises:
        UserError: llama.cpp computes another model, has no such tokenizer, or pools in another way.
    """
    is_causal = architecture_of(config, has_head).is_causal
    tokenizer = read_tokenizer(place, FIELD)
    check_ids(tokenizer, config.vocab_size, f"{FIELD}: the tokenizer of {place!r}")
    token_types = None if is_causal else config.type_vocab_size
    described = vocabulary(tokenizer, config.vocab_size, token_types)
    return Header(name, tokenizer, described, None if modules is None else _pooling(modules))


def _pooling(modules: str) -> str:
    read = read_sentence_modules(modules, "auto", FIELD)
    if read.dense:
        raise UserError(
            f"{FIELD}: found a Dense module behind the pooling, which llama.cpp has not for every model; take onnx, or "
            f"add --no-head to a folder without modules.json to pool yourself"
        )
    return read.pooling
