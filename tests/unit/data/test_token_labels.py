"""Task `token_scores`: which tokens have labels, and when a run takes it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from homodistil.config.schema import DataConfig
from homodistil.data.task import TASKS, settle_task, task_of

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[E1]", *map(chr, range(97, 123))]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> PreTrainedTokenizerFast:
    vocabulary: Path = tmp_path_factory.mktemp("labels") / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    return BertTokenizerFast(vocab=str(vocabulary), additional_special_tokens=["[E1]"])


def test_tokens_of_the_text_have_labels_and_its_frame_has_none(tokenizer):
    """As in the tokenizer's own mask of special tokens; an unknown word and a marker in the text are parts of it."""
    task, data = TASKS["token_scores"], DataConfig(task="token_scores", seq_len=7)
    texts = ["a b ? [E1] z", "c", "q [MASK] r"]
    encoded = tokenizer(texts, padding="max_length", max_length=7, truncation=True, return_special_tokens_mask=True)
    blocks = np.array(encoded["input_ids"])
    batch = task.batch_maker(tokenizer, data, seed=0)(blocks, np.arange(3), np.zeros(3, dtype=int))
    has_label = torch.zeros(blocks.shape, dtype=torch.bool)
    has_label.view(-1)[batch.target_index] = True
    assert torch.equal(has_label, torch.tensor(encoded["special_tokens_mask"]) == 0)
    assert torch.equal(batch.input_ids, torch.from_numpy(blocks))
    assert torch.equal(batch.target_ids, torch.from_numpy(blocks)[has_label])
    assert (batch.counts.target_rows, batch.counts.tokens) == (5 + 1 + 3, 7 + 3 + 5)
    assert task_of(data) is task and task.target_rows(data) == 5 and not task.has_lm_head and task.has_labels
    none = task.batch_maker(tokenizer, data, seed=0).without_targets(blocks)
    assert len(none.target_index) == 0 and none.counts.target_rows == 0
    assert task.fingerprint(tokenizer) == TASKS["scores"].fingerprint(tokenizer)


@pytest.mark.parametrize("given", ["auto", "scores", "token_scores"])
def test_the_teacher_decides(given):
    settle_task(data := DataConfig(task=given), "mlm", "teacher", has_head=False, labels="token_scores")
    assert data.task == "token_scores"
    settle_task(data := DataConfig(task="none"), "mlm", "teacher", has_head=False)
    assert data.task == "none"
