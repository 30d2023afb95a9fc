"""Short steps: nothing of a block is lost, framed parts, and the same batches whatever the ranks and micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from homodistil.config.schema import DataConfig
from homodistil.data.loader import BatchLoader
from homodistil.data.prepare.corpus import Rows
from homodistil.data.short_steps import PARTS, Ends, ShortSteps, numbers_of_parts

CLS, SEP, PAD, WIDTH = 101, 102, 0, 34
ENDS = Ends(CLS, SEP, PAD)


def block(num_tokens: int, first: int = 1000) -> list[int]:
    """So many tokens of text between [CLS] and [SEP], and padding."""
    text = [CLS, *range(first, first + num_tokens), SEP]
    return text + [PAD] * (WIDTH - len(text))


def naive_parts(row: list[int], num_parts: int) -> list[list[int]]:
    width = WIDTH // num_parts
    made = []
    for part in range(num_parts):
        text = row[1:-1][part * (width - 2) : (part + 1) * (width - 2)]
        made.append([CLS, *text, PAD if text[-1] == PAD else SEP])
    return made


@pytest.mark.parametrize("num_parts", PARTS)
@pytest.mark.parametrize("num_tokens", [WIDTH - 2, 20, 7, 1])
def test_parts_hold_the_text_in_turn(num_parts, num_tokens):
    rows = np.array([block(num_tokens), block(WIDTH - 2, first=2000)])
    split = ShortSteps(0.5, ENDS, seed=0).split(rows, num_parts)
    assert split.tolist() == [part for row in rows.tolist() for part in naive_parts(row, num_parts)]
    first = split[:num_parts]
    kept = num_parts * (WIDTH // num_parts - 2)
    assert first[first >= 1000].tolist() == list(range(1000, 1000 + min(num_tokens, kept)))
    assert (split[:, 0] == CLS).all()
    # A part ends with its own [SEP], or behind the text with the block's and padding.
    assert all(row[-1] in (SEP, PAD) for row in split.tolist())


def test_the_share_of_short_steps_and_each_number_of_parts():
    short = ShortSteps(0.4, ENDS, seed=5)
    parts = np.array([short.num_parts(step, 128) for step in range(3000)])
    assert abs((parts > 1).mean() - 0.4) < 0.03
    for number in PARTS:
        assert abs((parts == number).mean() - 0.4 / 3) < 0.03
    assert {short.num_parts(step, 16) for step in range(200)} == {1, 2}  # parts have 8 tokens at least
    assert {short.num_parts(step, 15) for step in range(200)} == {1}
    assert [short.num_parts(step, 128) for step in range(50)] == parts[:50].tolist()
    assert [ShortSteps(0.4, ENDS, seed=6).num_parts(step, 128) for step in range(50)] != parts[:50].tolist()


def test_numbers_of_parts_are_all_different():
    samples = np.array([0, 1, 7, 2**32])
    numbers = numbers_of_parts(samples, 8)
    assert len(set(numbers.tolist())) == 32 and numbers[::8].tolist() == samples.tolist() and (numbers >= 0).all()


@pytest.fixture
def rows(tmp_path):
    np.save(tmp_path / "rows.npy", np.array([block(WIDTH - 2, 1000 + 50 * i) for i in range(24)], dtype=np.uint16))
    return Rows(tmp_path / "rows.npy")


def loader(rows, tokenizer, world=1, rank=0, micro=2, task="mlm", workers=0):
    config = DataConfig(workers=workers, task=task, short_steps=0.6)
    return BatchLoader(rows, tokenizer, config, 3, 8, micro, rank, world)


@pytest.mark.parametrize("task", ["mlm", "none"])
def test_a_step_is_the_same_on_any_number_of_ranks_and_micro_batches(rows, tokenizer, task):
    widths = set()
    for consumed in range(0, 80, 8):
        alone = loader(rows, tokenizer, task=task).micro_batches(consumed)
        widths.add(alone[0].input_ids.shape)
        for rank in range(2):
            share = loader(rows, tokenizer, 2, rank, task=task).micro_batches(consumed)
            for m, batch in enumerate(share):
                assert all(torch.equal(x, y) for x, y in zip(batch.tensors, alone[2 * m + rank].tensors, strict=True))
        whole = loader(rows, tokenizer, micro=8, task=task).micro_batches(consumed)[0]
        assert torch.equal(whole.input_ids, torch.cat([batch.input_ids for batch in alone]))
    assert widths == {(2, 34), (4, 17), (8, 8)}  # 34 // 8 = 4 tokens are too few


def test_masks_of_parts_are_drawn_for_each(rows, tokenizer):
    """About .15 of the tokens, at other places of each part."""
    batches = [loader(rows, tokenizer, micro=8).micro_batches(8 * step)[0] for step in range(60)]
    short = [batch for batch in batches if batch.input_ids.shape[1] < WIDTH]
    share = sum(len(batch.target_index) for batch in short) / sum(
        len(batch.input_ids) * (batch.input_ids.shape[1] - 2) for batch in short
    )
    assert abs(share - 0.15) < 0.02
    places = torch.zeros(short[0].input_ids.shape, dtype=torch.bool).flatten()
    places[short[0].target_index] = True
    per_part = places.view(8, -1, short[0].input_ids.shape[1])
    assert not all(torch.equal(per_part[:, 0], per_part[:, i]) for i in range(1, per_part.shape[1]))


def test_workers_prepare_the_same_batches(rows, tokenizer):
    ahead, here = loader(rows, tokenizer, workers=1), loader(rows, tokenizer)
    for consumed in (0, 8, 16):
        for one, other in zip(ahead.micro_batches(consumed), here.micro_batches(consumed), strict=True):
            assert torch.equal(one.input_ids, other.input_ids)


def test_single_texts_and_causal_models_have_none(rows, tokenizer):
    from homodistil.data.task import TASKS

    config = DataConfig(short_steps=0.6)
    made = {name: task.short_steps(tokenizer, config, 0) is not None for name, task in TASKS.items()}
    assert {name for name, is_made in made.items() if is_made} == {"mlm", "none"}
