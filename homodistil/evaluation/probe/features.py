"""Vectors of sentences from a frozen encoder or decoder: the mean of the last hidden states of a sentence's tokens, or
what sentence-transformers makes of them where its modules lie beside the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedTokenizerBase

from homodistil.data.tokenizer import check_ids, check_words, read_tokenizer
from homodistil.evaluation import progress
from homodistil.evaluation.glue.checkpoint import FIELD, load_model, max_tokens
from homodistil.models.config_file import read_config
from homodistil.models.sentence_head import load_sentence_head
from homodistil.models.sentence_modules import (
    SentenceModules,
    read_sentence_modules,
    sentence_root,
    transformer_folder,
)

BATCH_TOKENS = 4096
"""Tokens of a batch, padding included: what keeps a core busy and fits any GPU."""


class SentenceFeatures:
    """A frozen checkpoint that turns sentences into vectors.

    Sentences are padded on the right, where a causal model's tokens do not look and absolute positions are not shifted.

    Args:
        folder: folder or hub name, from `checkpoint_folder`.
        max_length: tokens per sentence, special tokens included; longer sentences are truncated.
        device: of the model.
        dtype: of the model's weights and activations; the mean is taken in float32.

    Raises:
        UserError: the checkpoint or its tokenizer cannot be loaded, or does not fit together.
    """

    def __init__(
        self,
        folder: str,
        max_length: int = 128,
        device: torch.device | str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        is_embedder = sentence_root(folder) is not None
        modules = read_sentence_modules(folder, "auto", FIELD) if is_embedder else SentenceModules(normalises=False)
        folder = str(transformer_folder(Path(folder), FIELD)) if Path(folder).is_dir() else folder
        config = read_config(folder, FIELD)
        self.max_length = min(max_length, max_tokens(config, max_length), modules.max_seq_length or max_length)
        self.tokenizer = _tokenizer(folder, config.vocab_size)
        self.device = torch.device(device)
        model = load_model(AutoModel, folder)
        self.model = model.eval().requires_grad_(False).to(self.device, getattr(torch, dtype))
        self._head, self._prompt = load_sentence_head(modules, FIELD).to(self.device), modules.prompt("auto")

    @property
    def num_parameters(self) -> int:
        """Of the backbone: tied embeddings once, no language-modelling head, no pooler."""
        return sum(p.numel() for name, p in self.model.named_parameters() if not name.startswith("pooler."))

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """(N, dims of a vector) float32: one row per sentence. Sentences that occur twice are computed once."""
        place = {sentence: i for i, sentence in enumerate(dict.fromkeys(sentences))}
        texts = [self._prompt + sentence for sentence in place]
        ids = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        rows = np.empty((len(ids), self._head.num_dims or self.model.config.hidden_size), np.float32)
        batches = list(_batches(list(map(len, ids))))
        for number, batch in enumerate(batches, start=1):
            progress.now(f"batch {number} of {len(batches)}")
            rows[batch] = self._vectors([ids[i] for i in batch]).cpu().numpy()
        return rows[[place[sentence] for sentence in sentences]]

    @torch.no_grad()
    def _vectors(self, ids: list[list[int]]) -> Tensor:
        """(B, dims) float32, on the device."""
        batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.device)
        states = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return self._head(states, batch["attention_mask"])


def _tokenizer(folder: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """That of the checkpoint, padding on the right. Padding is masked: any token will do where none is for it."""
    tokenizer = read_tokenizer(folder, FIELD)
    where = f"{FIELD}: the tokenizer of {folder!r}"
    check_ids(tokenizer, vocab_size, where)
    check_words(tokenizer, where)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in batches of at most BATCH_TOKENS, padded to their longest: alike lengths stay together."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= BATCH_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
