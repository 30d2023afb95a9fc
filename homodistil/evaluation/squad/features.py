"""Question and context as model inputs: overlapping windows of tokens, with the position of the answer in each.

As in the code of the BERT paper, windows have `max_length` tokens, and consecutive windows share `stride` tokens of the
context. The label of a window without the whole answer, or of a question without an answer, is the first token ([CLS]).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from homodistil.errors import UserError
from homodistil.evaluation.squad.examples import Example

MAX_QUESTION_TOKENS = 64
_BATCH = 1000  # questions per call, which limits the memory of the tokenizer's output


class Windows(NamedTuple):
    """All windows of some examples, in the order of the examples."""

    inputs: list[dict[str, Any]]
    """input_ids, attention_mask, ...; for training also start_positions and end_positions (token indices)."""
    owners: list[int]
    """Index of the example that the window belongs to."""
    spans: list[list[tuple[int, int] | None]]
    """For each token: (first, last + 1) character in the context; None for tokens outside the context."""
    null_tokens: list[int]
    """Index of the token that stands for "no answer"."""


def check_lengths(tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int) -> None:
    """Raise `UserError` if a window has no space for the longest question and at least one new token of context."""
    if not tokenizer.is_fast:
        raise UserError(
            "--checkpoint: its tokenizer has no tokenizer.json, so it knows no character positions; add one"
        )
    room = max_length - MAX_QUESTION_TOKENS - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 1:
        raise UserError(
            f"--max-length: found {max_length}, a window needs at least {max_length - room + 1} (a question takes up "
            f"to {MAX_QUESTION_TOKENS} tokens); raise --max-length"
        )
    if not 0 <= stride < room:
        raise UserError(
            f"--stride: found {stride}, allowed are 0 to {room - 1} beside --max-length {max_length} (a question takes "
            f"up to {MAX_QUESTION_TOKENS} tokens); lower --stride or raise --max-length"
        )


def windows(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int, labelled: bool
) -> Windows:
    """All windows of `examples`.

    Args:
        max_length, stride: in tokens, see above.
        labelled: whether to add the position of the first answer, for training.

    Raises:
        UserError: as in `check_lengths`.
    """
    check_lengths(tokenizer, max_length, stride)
    all_windows = Windows([], [], [], [])
    for first in range(0, len(examples), _BATCH):
        _add(all_windows, examples[first : first + _BATCH], first, tokenizer, max_length, stride)
    if labelled:
        for inputs, owner, spans, null in zip(*all_windows, strict=True):
            start, end = _position(examples[owner], spans) or (null, null)
            inputs |= {"start_positions": start, "end_positions": end}
    return all_windows


def _add(target: Windows, examples, first: int, tokenizer, max_length: int, stride: int) -> None:
    encoded = tokenizer(
        _cut_questions(examples, tokenizer),
        [example.context for example in examples],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    owners, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    for i, (owner, pairs) in enumerate(zip(owners, offsets, strict=True)):
        inputs = {name: values[i] for name, values in encoded.items()}
        ids, sequences = inputs["input_ids"], encoded.sequence_ids(i)
        target.inputs.append(inputs)
        target.owners.append(first + owner)
        target.spans.append([tuple(pair) if s == 1 else None for pair, s in zip(pairs, sequences, strict=True)])
        target.null_tokens.append(ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0)


def _cut_questions(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Questions truncated to `MAX_QUESTION_TOKENS`; the tokenizer itself truncates only the context."""
    questions = [example.question for example in examples]
    encoded = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)
    ends = [pairs[:MAX_QUESTION_TOKENS][-1][1] if pairs else 0 for pairs in encoded["offset_mapping"]]
    return [question[:end] for question, end in zip(questions, ends, strict=True)]


def _position(example: Example, spans: Sequence[tuple[int, int] | None]) -> tuple[int, int] | None:
    """First and last token of the first answer; None if the window does not contain all of it."""
    context = [i for i, span in enumerate(spans) if span is not None]
    if not example.answers or not context:
        return None
    start, end = example.answers[0].start, example.answers[0].start + len(example.answers[0].text)
    inside = [i for i in context if spans[i][1] > start and spans[i][0] < end]
    # A window that begins or ends inside the answer contains only a part of it.
    whole = inside and spans[context[0]][0] <= start and spans[context[-1]][1] >= end
    return (inside[0], inside[-1]) if whole else None
