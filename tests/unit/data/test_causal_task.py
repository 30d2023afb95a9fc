"""Text and batches of causal language models: blocks without a frame, next tokens, bytes of tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.tiny_decoder import END, make_tokenizer, write_text

from homodistil.config.schema import DataConfig
from homodistil.data.batch import LossCounts
from homodistil.data.causal_lm import NextToken
from homodistil.data.prepare.packing import BlockFile, Packer, Rows
from homodistil.data.task import TASKS, Frame, settle_task, task_of
from homodistil.data.token_bytes import token_bytes
from homodistil.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(write_text(tmp_path_factory.mktemp("text"), 20))


def test_every_token_but_the_first_is_predicted_from_those_before_it():
    blocks = np.array([[5, 6, 7, 8], [9, 8, 7, 6], [1, 1, 2, 3]])
    batch = NextToken()(blocks, np.arange(3), np.zeros(3, dtype=np.int64))
    rows = [(b, t) for b in range(3) for t in range(3)]
    assert [divmod(index, 4) for index in batch.target_index.tolist()] == rows
    assert batch.target_ids.tolist() == [int(blocks[b, t + 1]) for b, t in rows]
    assert torch.equal(batch.input_ids, torch.from_numpy(blocks)) and batch.padding_mask is None
    pairs = sum(j <= i for _ in range(3) for i in range(4) for j in range(4))
    assert batch.counts == LossCounts(9.0, 12.0, float(pairs))
    assert TASKS["causal"].target_rows(DataConfig(seq_len=4)) == 3
    in_window = NextToken(window=2).without_targets(blocks).counts.window_pairs
    assert in_window == sum(0 <= i - j < 2 for _ in range(3) for i in range(4) for j in range(4))


def test_a_batch_that_predicts_nothing():
    batch = NextToken().without_targets(np.array([[5, 6, 7]]))
    assert len(batch.target_index) == len(batch.target_ids) == 0 and batch.counts.target_rows == 0


def test_blocks_are_cut_out_of_the_stream_of_documents(tmp_path):
    frame = Frame(first=None, last=None, between=0, pad=None)
    packer = Packer(frame, seq_len=4)
    documents = [[11, 12, 13], [21, 22], [31, 32, 33, 34, 35]]
    stream = [11, 12, 13, 0, 21, 22, 0, 31, 32, 33, 34, 35]
    assert packer.num_blocks(np.array([3, 3, 4])) == len(stream) // 4 == 3
    out = BlockFile(tmp_path / "blocks.npy", 3, 4, np.dtype(np.uint16))
    for i, document in enumerate(documents):
        packer.add(Rows(np.array([i]), np.array([len(document)]), np.array(document)), out)
    packer.close(out)
    out.close()
    assert np.load(tmp_path / "blocks.npy").tolist() == np.reshape(stream, (3, 4)).tolist()
    assert Packer(frame, 5).num_blocks(np.array([3, 3, 4])) == 2  # the rest of two tokens fills no block


def test_the_task_follows_from_the_teacher():
    data = DataConfig()
    settle_task(data, "causal", "llama")
    assert data.task == "causal" and task_of(data) is TASKS["causal"]
    with pytest.raises(UserError, match=r"^data.task: found mlm, but the teacher 'x' is a causal language model; set"):
        settle_task(DataConfig(task="mlm"), "causal", "x")


@pytest.mark.parametrize("text", ["the cat sees a red house.", "naïve Straße 北京 \u00a0 …", "  two\n\nlines\t"])
def test_bytes_of_tokens_add_up_to_the_text(tokenizer, text):
    sizes = token_bytes(tokenizer, len(tokenizer) + 3)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert int(sizes[ids].sum()) == len(text.encode())
    assert int(sizes[tokenizer.convert_tokens_to_ids(END)]) == 0 and sizes[-3:].tolist() == [0, 0, 0]
