"""Bytes of text that each token of a vocabulary stands for: what makes losses of different tokenizers comparable."""

from __future__ import annotations

import json
import re

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
    """int64 (vocab_size,). Special tokens, and ids that the tokenizer does not know, count 0.

    In a byte-level vocabulary (GPT-2's alphabet) each character of a token is one byte; elsewhere a token is UTF-8
    text with "▁" for a space, or one byte as <0xNN>.
    """
    is_byte_level = "ByteLevel" in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"))
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    special = set(tokenizer.all_special_ids)
    for token, token_id in tokenizer.get_vocab().items():
        if token_id not in special and token_id < vocab_size:
            counts[token_id] = len(token) if is_byte_level else _utf8_bytes(token)
    return counts


def _utf8_bytes(token: str) -> int:
    return 1 if _BYTE.fullmatch(token) else len(token.replace("▁", " ").encode())
