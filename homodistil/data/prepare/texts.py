"""What one text is, for tasks whose blocks hold one text each: a document, a passage or a sentence (data.texts).

Sentences are split by one rule, without a model of a language: a sentence ends behind `.`, `!` or `?` (also those of
Chinese and Japanese, `...`, and closing quotes and brackets behind them) where white space and then no small letter
follow, and at an empty line. It does not end behind a single letter (an initial) or one of a few English
abbreviations. Sentences of languages that write neither are documents up to the next empty line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from tokenizers import Tokenizer

from homodistil.config.schema import DataConfig
from homodistil.errors import UserError

NO_PROMPT = "none"
"""Value of data.prompt."""
RULE_VERSION = 1
"""Part of a corpus's fingerprint; raise it when texts are cut in another way."""
_END = re.compile(
    r"""(?:[.!?]+["'”’»)\]]*\s+(?![a-z\s])   # white space behind, and what may begin a sentence
          | [。！？]+["'”’»」』)\]]*\s*          # needs no white space
          | \n\s*\n)""",
    re.VERBOSE,
)
_ABBREVIATIONS = r"Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Gen|Col|Capt|Rev|vs|etc|cf|al|No|Fig|e\.g|i\.e"
_NO_END = re.compile(rf"""(?:^|[\s("'“])(?:[^\W\d_]|{_ABBREVIATIONS})\.\s+$""")
_SHOWN_BEFORE = 12
"""Characters in front of a full stop in which an abbreviation is looked for."""


class TextRule(NamedTuple):
    """How documents become texts, and what stands before each of them."""

    unit: Literal["document", "passage", "sentence"]
    """document: the beginning of a document; passage: a document in pieces of nearly equal length; sentence: each
    sentence, truncated."""
    prompt: tuple[int, ...] = ()
    """Token ids before every text."""
    lead: str = ""
    """What is put before a text so that it is tokenised as behind the prompt."""

    def parts(self, piece: str, is_first: bool) -> Iterator[str]:
        """What of a piece of a document is tokenised as one. `is_first`: it begins the document."""
        if self.unit == "sentence":
            yield from (self.lead + sentence for sentence in sentences(piece))
        else:
            yield self.lead + piece if is_first else piece


def text_rule(config: DataConfig, tokenizer: Tokenizer, num_framing: int) -> TextRule:
    """The rule of `config`, whose prompt is the text itself by now (training/settle.py), or NO_PROMPT.

    Args:
        tokenizer: without truncation and padding.
        num_framing: tokens of a block that its frame takes.

    Raises:
        UserError: the prompt leaves no space for a text.
    """
    prompt, lead = _prompt("" if config.prompt == NO_PROMPT else config.prompt, tokenizer)
    if len(prompt) + num_framing >= config.seq_len:
        raise UserError(
            f"data.prompt: {config.prompt!r} has {len(prompt)} tokens, which leaves no space for a text in "
            f"{config.seq_len} tokens (data.seq_len); raise data.seq_len or shorten the prompt"
        )
    return TextRule(config.texts, prompt, lead)


def _prompt(prompt: str, tokenizer: Tokenizer) -> tuple[tuple[int, ...], str]:
    """(ids of the prompt, what to put before a text) such that both together are the ids of prompt + text.

    White space at the end of a prompt belongs to the next word for tokenizers of bytes, and to nothing for others.
    """

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    if not prompt:
        return (), ""
    of_prompt = ids(prompt.rstrip())
    for lead in ("", prompt[len(prompt.rstrip()) :]):
        if ids(f"{prompt}Text") == of_prompt + ids(f"{lead}Text"):
            return tuple(of_prompt), lead
    return tuple(ids(prompt)), ""  # the first token of a text may differ from what the prompt makes of it


def sentences(text: str) -> list[str]:
    """The sentences of `text`, without white space around them, in order; none of them is empty."""
    ends = [match.end() for match in _END.finditer(text) if not _is_abbreviation(text, match)]
    cuts = [0, *ends, len(text)]
    parts = (text[start:end].strip() for start, end in zip(cuts, cuts[1:], strict=False))
    return [part for part in parts if part]


def _is_abbreviation(text: str, end: re.Match) -> bool:
    return _NO_END.search(text[max(0, end.start() - _SHOWN_BEFORE) : end.end()]) is not None
