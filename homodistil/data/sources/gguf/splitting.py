"""How text is cut before byte-level BPE, by llama.cpp's names (tokenizer.ggml.pre), in the tokenizers library."""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Regex, pre_tokenizers

_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Of OpenAI's cl100k and many after it, with DIGITS for the numbers of digits that stay together."""


class Splitting(NamedTuple):
    """How text is cut before BPE."""

    steps: tuple[pre_tokenizers.PreTokenizer, ...]
    ignore_merges: bool = False
    """A piece that is in the vocabulary is one token, whatever the merges make of it."""
    adds_bos: bool = False
    """Where the file does not say."""


def _bytes(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _cl100k(digits: str) -> tuple[pre_tokenizers.PreTokenizer, ...]:
    return pre_tokenizers.Split(Regex(_CL100K.replace("{DIGITS}", digits)), "isolated"), _bytes(use_regex=False)


SPLITTINGS = {
    "smollm": Splitting((pre_tokenizers.Digits(individual_digits=True), _bytes(use_regex=True))),
    "gpt-2": Splitting((_bytes(use_regex=True),)),
    "llama-bpe": Splitting(_cl100k("{1,3}"), ignore_merges=True, adds_bos=True),  # Llama 3
    "dbrx": Splitting(_cl100k("{1,3}")),  # OLMo 2 as well
    "qwen2": Splitting(_cl100k("")),  # Qwen3 as well
}
"""By tokenizer.ggml.pre."""
