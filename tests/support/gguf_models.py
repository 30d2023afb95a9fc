"""One tiny model of every architecture that is exported to GGUF, and tokenizers of each kind that llama.cpp has."""

from __future__ import annotations

from typing import Any

import torch
from families.cases import CASES
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from homodistil.data.sources.gguf.splitting import SPLITTINGS
from homodistil.export.formats.exportable import Exportable
from homodistil.models import family_of
from support.gguf_file import MERGES, SPECIAL, TOKENS

# llama.cpp reads some only where the heads' dims are the hidden size, and has Gemma 3's windows in its code.
_CHANGES: dict[str, dict[str, Any]] = {
    "qwen2": {"head_dim": 6},
    "olmo2": {"head_dim": 6},
    "gemma3_text": {
        "query_pre_attn_scalar": 8,
        "num_hidden_layers": 7,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
    },
}
PADDING_ROWS = 3
"""Of the embeddings, behind the last token."""


def gguf_model(model_type: str, **changes: Any) -> torch.nn.Module:
    """With weights far from their initial ones, and a row for every token of `byte_level`; in evaluation mode."""
    config = CASES[model_type].make_config()
    words = {"vocab_size": len(TOKENS) + PADDING_ROWS}
    for name, value in (words | _CHANGES.get(model_type, {}) | changes).items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = family_of(model_type).empty_model(config)
    for name, parameter in model.named_parameters():
        is_gamma = ("norm" in name.lower() or ".ln_" in name) and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(is_gamma), std=0.1)
    return model.eval()


def exportable(model_type: str, **changes: Any) -> Exportable:
    """An encoder without its head, a decoder with it."""
    model = gguf_model(model_type, **changes)
    return Exportable(model if family_of(model_type).is_causal else model.base_model, max_tokens=38)


def byte_level(pre: str = "gpt-2") -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, cutting text as llama.cpp's `pre` does."""
    splitting = SPLITTINGS[pre]
    merges = [tuple(merge.split()) for merge in MERGES]
    ids = {token: number for number, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=splitting.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(splitting.steps))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return _fast(tokenizer)


def sentence_pieces(prepends: bool) -> PreTrainedTokenizerFast:
    """A SentencePiece model: merges are every way to make a piece, by the order of pieces."""
    of_bytes = [f"<0x{number:02X}>" for number in range(256)]
    pieces = ["he", "▁t", "in", "▁the", "the", "ing", "▁▁"]
    letters = [chr(number) for number in range(33, 127)] + ["▁", "é"]
    tokens = ["<unk>", *SPECIAL, *of_bytes, *pieces, *letters]
    known = {*pieces, *letters}
    cuts = [(piece[:at], piece[at:]) for piece in pieces for at in range(1, len(piece))]
    merges = [pair for pair in cuts if known.issuperset(pair)]
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepends else replace
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", *SPECIAL)])
    return _fast(tokenizer)


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    unknown = {"unk_token": "<unk>"} if tokenizer.token_to_id("<unk>") is not None else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2], **unknown
    )
