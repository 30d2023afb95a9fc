"""Small real decoders with a byte-level BPE tokenizer, as checkpoints in a folder, and text to train them on."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

END = "<|endoftext|>"
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
"""Three groups of two query heads."""
_SIZES_OF: dict[type[PretrainedConfig], dict[str, object]] = {
    Gemma3TextConfig: SIZES
    | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32, "query_pre_attn_scalar": 6},
    GPT2Config: {"n_embd": 48, "n_inner": 80, "n_layer": 2, "n_head": 6, "n_positions": 64},
}
"""Of the classes that do not take `SIZES` as they are."""
_WORDS = "the a cat dog bird sees finds hears red blue small old house tree river and then because slowly again".split()


def write_text(folder: Path, num_documents: int = 60, seed: int = 0) -> Path:
    """Documents of simple sentences, one file each."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num_documents):
        sentences = [" ".join(draw.choices(_WORDS, k=draw.randint(4, 9))) + "." for _ in range(draw.randint(8, 16))]
        (folder / f"{i}.txt").write_text(" ".join(sentences))
    return folder


def make_tokenizer(text: Path, vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE (GPT-2's alphabet) trained on the files of a folder. Its one special token ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train([str(path) for path in sorted(text.glob("*.txt"))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)


def make_decoder(kind: type[PretrainedConfig], vocab_size: int = 300, **sizes: object) -> torch.nn.Module:
    """A model of the configuration class `kind` with weights that are far from nothing."""
    torch.manual_seed(0)
    config = kind(
        **_SIZES_OF.get(kind, SIZES) | sizes, vocab_size=vocab_size, pad_token_id=None, bos_token_id=0, eos_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name or ".ln_" in name else 0.0, std=0.2)
    return model.eval()


def write_decoder(folder: Path, kind: type[PretrainedConfig], text: Path, **sizes: object) -> Path:
    """A checkpoint of `make_decoder` with its tokenizer."""
    tokenizer = make_tokenizer(text)
    make_decoder(kind, len(tokenizer), **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
