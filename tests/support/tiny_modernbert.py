"""A small real ModernBERT with a byte-level BPE tokenizer that frames texts as its own does."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import processors
from transformers import ModernBertConfig, ModernBertForMaskedLM, PreTrainedTokenizerFast

from support.tiny_decoder import make_tokenizer

SPECIAL = {
    name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
}
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "local_attention": 12,
}
"""Six heads of 8. Layers 1 and 2 see 6 tokens on each side."""


def write_modernbert(folder: Path, text: Path, **sizes: object) -> Path:
    """A checkpoint with weights that are far from nothing, and its tokenizer, trained on the files of `text`."""
    tokenizer = _tokenizer(text)
    ids = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ("pad_token", "cls_token", "sep_token")}
    ids |= {"bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}
    torch.manual_seed(0)
    model = ModernBertForMaskedLM(ModernBertConfig(**SIZES | sizes, **ids, vocab_size=len(tokenizer)))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(text: Path) -> PreTrainedTokenizerFast:
    bpe = make_tokenizer(text).backend_tokenizer
    bpe.add_special_tokens(list(SPECIAL.values()))
    ends = [(SPECIAL[name], bpe.token_to_id(SPECIAL[name])) for name in ("sep_token", "cls_token")]
    bpe.post_processor = processors.BertProcessing(*ends)
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **SPECIAL, model_input_names=names)
