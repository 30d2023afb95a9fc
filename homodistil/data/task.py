"""What a model learns to predict: masked tokens, the next one, or nothing. A family says which (ModelFamily.task).

A task says how text is framed in blocks, what the tokenizer has to bring, how blocks become batches, and how many
tokens of a block are predicted. Everything else of the data is the same for all tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from homodistil.config.schema import DataConfig
from homodistil.data.batch import Batch
from homodistil.data.causal_lm import NextToken
from homodistil.data.masked_lm import Masker, TokensOfText, Unmasked
from homodistil.data.pairs import Pairs, pair_frame
from homodistil.data.short_steps import Ends, ShortSteps
from homodistil.errors import UserError
from homodistil.models.family_heads import HeadKind


class Frame(NamedTuple):
    """Token ids around and between the documents of a block."""

    first: int | None
    """Begins every block; None: nothing does."""
    last: int | None
    """Ends every block."""
    between: int
    """Stands between one document and the next."""
    pad: int | None
    """Fills the last block; None: a rest that fills no block is left out."""

    def body(self, seq_len: int) -> int:
        """Tokens of text in a block of `seq_len`."""
        return seq_len - (self.first is not None) - (self.last is not None)


class BatchMaker(Protocol):
    """Turns blocks of token ids into batches."""

    def __call__(self, blocks: np.ndarray, samples: np.ndarray, epochs: np.ndarray) -> Batch:
        """`blocks` (B, T) int64, which are the `samples` (B,) of the data set in `epochs` (B,)."""

    def without_targets(self, blocks: np.ndarray) -> Batch:
        """A batch with nothing to predict."""


class Task(ABC):
    name: str
    special_tokens: tuple[str, ...]
    """Attributes of a tokenizer that must not be None."""
    model: str
    """Whose tokenizer has them, for messages: "a masked language model"."""
    has_single_texts: bool = False
    """Whether a block holds one text or pair (data.texts, data.pair_columns), instead of as much of several documents
    as there is space for."""
    can_split_blocks: bool = False
    """Whether the blocks of some steps may be split into shorter ones (data.short_steps). A causal model learns every
    length from one block, and a single text has a length of its own."""
    has_vectors: bool = False
    """Whether the vectors of texts are learned that a teacher's sentence modules make."""
    has_token_labels: bool = False
    """Whether the labels that are learned (`has_labels`) are those of tokens, not of whole texts."""
    head: HeadKind = "lm"
    """What models have behind their backbone."""

    @property
    def has_lm_head(self) -> bool:
        """Whether models have a language-modelling head: losses over the vocabulary, and scores on held-out words."""
        return self.head == "lm"

    @property
    def has_labels(self) -> bool:
        """Whether models have a head of labels, whose logits are learned."""
        return self.head == "classifier"

    @abstractmethod
    def frame(self, tokenizer: PreTrainedTokenizerBase) -> Frame:
        """How blocks are framed."""

    @abstractmethod
    def batch_maker(
        self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, seed: int, window: int | None = None
    ) -> BatchMaker:
        """`seed`: of all draws; `window`: of the model's layers that have one, to count pairs by."""

    def short_steps(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, seed: int) -> ShortSteps | None:
        """Steps whose blocks are split (data.short_steps); None: there are none."""
        if not (self.can_split_blocks and data.short_steps):
            return None
        ends = Ends(tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
        return ShortSteps(data.short_steps, ends, seed)

    @abstractmethod
    def target_rows(self, data: DataConfig) -> float:
        """Tokens of one block that are predicted, on average."""

    def fingerprint(self, tokenizer: PreTrainedTokenizerBase) -> list:
        """What a prepared corpus depends on, beside text, tokenizer and settings."""
        return list(self.frame(tokenizer))


class MaskedLM(Task):
    """BERT's: some tokens are masked, and predicted from both sides."""

    name = "mlm"
    special_tokens = ("mask_token", "pad_token", "cls_token", "sep_token")
    model = "a masked language model"
    can_split_blocks = True

    def frame(self, tokenizer: PreTrainedTokenizerBase) -> Frame:
        separator = tokenizer.sep_token_id
        return Frame(tokenizer.cls_token_id, separator, separator, tokenizer.pad_token_id)

    def batch_maker(
        self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, seed: int, window: int | None = None
    ) -> Masker:
        return Masker(tokenizer, data.mask_probability, seed, window)

    def target_rows(self, data: DataConfig) -> float:
        return data.mask_probability * (data.seq_len - 2)

    def fingerprint(self, tokenizer: PreTrainedTokenizerBase) -> list:
        """The list that corpora have been named by since before there was a second task: it must not change."""
        return [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id]


class CausalLM(Task):
    """GPT's: every token is predicted from those before it. Blocks are cut out of a stream of documents."""

    name = "causal"
    special_tokens = ("eos_token",)
    model = "a causal language model"

    def frame(self, tokenizer: PreTrainedTokenizerBase) -> Frame:
        return Frame(first=None, last=None, between=tokenizer.eos_token_id, pad=None)

    def batch_maker(
        self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, seed: int, window: int | None = None
    ) -> NextToken:
        return NextToken(window)

    def target_rows(self, data: DataConfig) -> float:
        return data.seq_len - 1


class HiddenStatesOnly(MaskedLM):
    """An encoder without a head, which learns from its teacher's hidden states, attention and embeddings alone.

    Text is framed as for a masked language model, so that both share a prepared corpus.
    """

    name = "none"
    special_tokens = ("pad_token", "cls_token", "sep_token")
    model = "an encoder"
    head = "none"

    def batch_maker(
        self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, seed: int, window: int | None = None
    ) -> Unmasked:
        return Unmasked(tokenizer, data.mask_probability, seed, window)

    def target_rows(self, data: DataConfig) -> float:
        return 0


class Embedding(HiddenStatesOnly):
    """An encoder whose pooled vectors of texts are learned, those of a sentence embedder. A block holds one text."""

    name = "embedding"
    has_single_texts = has_vectors = True
    can_split_blocks = False


class Scores(HiddenStatesOnly):
    """A sequence classifier or cross-encoder whose logits are learned. A block holds one text, or one pair of texts."""

    name = "scores"
    model = "a sequence classifier"
    has_single_texts = True
    can_split_blocks = False
    head = "classifier"

    def batch_maker(
        self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, seed: int, window: int | None = None
    ) -> Unmasked:
        if not data.pair_columns:
            return super().batch_maker(tokenizer, data, seed, window)
        return Pairs(tokenizer, pair_frame(tokenizer), window)


class TokenScores(Scores):
    """A token classifier whose logits are learned, at every token that comes from the text. A block holds one text."""

    name = "token_scores"
    model = "a token classifier"
    has_token_labels = True

    def batch_maker(
        self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, seed: int, window: int | None = None
    ) -> TokensOfText:
        return TokensOfText(tokenizer, window)

    def target_rows(self, data: DataConfig) -> float:
        return data.seq_len - 2


_ALL = (MaskedLM(), CausalLM(), HiddenStatesOnly(), Embedding(), Scores(), TokenScores())
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
ENCODER_TASKS = ("mlm", "none", "embedding", "scores", "token_scores")
"""What an encoder can be trained to do; its family's own first."""


def task_of(data: DataConfig, of_family: str = "mlm") -> Task:
    """The task that `data.task` names.

    `auto` counts as `of_family` (`ModelFamily.task`), or as masked, for callers without a teacher; a run replaces it
    first (training/settle.py). A causal tokenizer is then refused, since it has no mask token.
    """
    return TASKS[of_family if data.task == "auto" else data.task]


def settle_task(
    data: DataConfig,
    wanted: str,
    teacher: str,
    has_head: bool = True,
    is_embedder: bool = False,
    labels: str | None = None,
) -> None:
    """Replace `auto` by what the teacher does, and `scores` by `token_scores` for a token classifier, in place.

    Args:
        wanted: `ModelFamily.task` of the teacher.
        teacher: what the user named it, for the message.
        has_head: whether it has a language-modelling head, or will get one; an encoder needs none.
        is_embedder: whether it is a sentence embedder, of which nothing is wanted that a head is needed for.
        labels: the task of a teacher whose head of labels is learned, `scores` or `token_scores`; None: it is not.

    Raises:
        UserError: the config asks for another task.
    """
    allowed = ENCODER_TASKS if wanted in ENCODER_TASKS else (wanted,)
    if data.task not in ("auto", *allowed):
        raise UserError(
            f"data.task: found {data.task}, but the teacher {teacher!r} is {TASKS[wanted].model}; set "
            f"data.task={wanted} (or leave it auto), or give another teacher"
        )
    if labels is not None and wanted in ENCODER_TASKS:
        data.task = labels
    elif data.task == "auto":
        without_head = "none" if wanted in ENCODER_TASKS else wanted
        data.task = wanted if has_head else without_head
        if is_embedder and wanted in ENCODER_TASKS:
            data.task = "embedding"
