"""Masked language modelling: chooses the tokens to predict and replaces them (80/10/10, Devlin et al. 2019, 3.1).

Randomness depends only on (seed, epoch, sample index), so that a batch is the same on whichever rank it is drawn.
Shapes: B sequences, T tokens, M rows to predict.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from homodistil.data.batch import Batch, LossCounts
from homodistil.kernels.attention_map_inputs import MaskKind, num_pairs

_MASKED, _RANDOM = 0.8, 0.1  # Devlin et al. 2019, section 3.1; the rest stays as it is


class Masker:
    """Turns blocks of token ids into batches.

    Args:
        tokenizer: its special tokens are never predicted, and never used as random tokens.
        mask_probability: probability that an ordinary token is chosen, independently for each token.
        seed: of all random numbers.
        window: of the model's layers that have one, to count pairs by.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, mask_probability: float, seed: int, window: int | None = None
    ) -> None:
        self._mask_id, self._pad_id = tokenizer.mask_token_id, tokenizer.pad_token_id
        self._is_ordinary = np.ones(len(tokenizer), dtype=bool)
        self._is_ordinary[tokenizer.all_special_ids] = False
        self._ordinary_ids = np.flatnonzero(self._is_ordinary)
        self._probability = mask_probability
        self._seed = seed
        self._kind = None if window is None else MaskKind(window=window)

    def __call__(self, blocks: np.ndarray, samples: np.ndarray, epochs: np.ndarray) -> Batch:
        """Mask `blocks`.

        Args:
            blocks: token ids, (B, T) int64.
            samples: index of each block in the data set, (B,).
            epochs: epoch in which each block is drawn, (B,).
        """
        choice, action, token = self._draw(samples, epochs, blocks.shape[1])
        chosen = (choice < self._probability) & self._is_ordinary[blocks]
        random_ids = self._ordinary_ids[(token * len(self._ordinary_ids)).astype(np.int64)]
        replaced = np.where(action < _MASKED + _RANDOM, random_ids, blocks)
        replaced = np.where(action < _MASKED, self._mask_id, replaced)
        return self._batch(blocks, np.where(chosen, replaced, blocks), chosen)

    def without_targets(self, blocks: np.ndarray) -> Batch:
        """`blocks` (B, T) as a batch without rows to predict (M = 0)."""
        return self._batch(blocks, blocks, np.zeros(blocks.shape, dtype=bool))

    def _batch(self, blocks: np.ndarray, input_ids: np.ndarray, chosen: np.ndarray) -> Batch:
        valid = blocks != self._pad_id
        lengths = valid.sum(axis=1)
        index = np.flatnonzero(chosen)
        in_window = None if self._kind is None else float(num_pairs(lengths, self._kind))
        counts = LossCounts(float(len(index)), float(lengths.sum()), float((lengths**2).sum()), in_window)
        arrays = (input_ids, valid.astype(np.int64), index, blocks.ravel()[index], np.flatnonzero(valid))
        return Batch(*map(torch.from_numpy, arrays), counts)

    def _draw(self, samples: np.ndarray, epochs: np.ndarray, width: int) -> np.ndarray:
        """(3, B, T) uniform in [0, 1). One Philox key per sample, so that no number depends on other samples."""
        bits = np.random.Philox(key=0)
        generator, state = np.random.Generator(bits), bits.state
        uniform = np.empty((len(samples), 3, width))
        for row, (sample, epoch) in enumerate(zip(samples.tolist(), epochs.tolist(), strict=True)):
            state["state"]["key"][:] = self._seed << 32 | epoch, sample
            bits.state = state  # a new generator per sample would take three times as long
            generator.random(out=uniform[row])
        return uniform.transpose(1, 0, 2)


class TokensOfText(Masker):
    """For token classifiers: every token as it is, and all that come from the text are rows to predict.

    The tokens around a text ([CLS], [SEP], padding) are not: token classifiers have no labels there, in training or in
    use. [UNK] is, for it stands for a word of the text.

    Args:
        tokenizer, window: see `Masker`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, window: int | None = None) -> None:
        super().__init__(tokenizer, mask_probability=0.0, seed=0, window=window)
        framing = (getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "bos", "eos", "pad"))
        self._is_of_text = np.ones(len(tokenizer), dtype=bool)
        self._is_of_text[[number for number in framing if number is not None]] = False

    def __call__(self, blocks: np.ndarray, samples: np.ndarray, epochs: np.ndarray) -> Batch:
        """Batch of `blocks` (B, T) int64; the other arguments are of masked language modelling."""
        return self._batch(blocks, blocks, self._is_of_text[blocks])


class Unmasked(Masker):
    """The same batches with every token as it is, and nothing to predict."""

    def __call__(self, blocks: np.ndarray, samples: np.ndarray, epochs: np.ndarray) -> Batch:
        """Batch of `blocks` (B, T) int64; the other arguments are of masked language modelling."""
        return self.without_targets(blocks)
