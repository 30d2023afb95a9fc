"""A vocabulary of 152k tokens, every token predicted: no tensor of all logits exists, whatever is computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from homodistil.config.schema import LossConfig
from homodistil.data.causal_lm import NextToken
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.models import family_of
from homodistil.models.activations import ATTENTION

VOCABULARY, SEQUENCES, TOKENS = 152_000, 5, 128


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation inside puts out."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.fixture(scope="module")
def pair():
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    config._attn_implementation = ATTENTION
    torch.manual_seed(0)
    models = [family_of("llama").empty_model(config) for _ in range(2)]
    blocks = np.random.default_rng(0).integers(0, VOCABULARY, (SEQUENCES, TOKENS))
    batch = NextToken()(blocks, np.arange(SEQUENCES), np.zeros(SEQUENCES, dtype=np.int64))
    return Student(models[0], LossConfig(kl=1.0)), Teacher(models[1]), batch


def test_training_and_evaluation_hold_a_chunk_of_logits(pair):
    student, teacher, batch = pair
    with _Largest() as largest:
        terms = student(batch, teacher(batch))
        terms.total.backward()
        loss, kl = student.lm_losses(batch, teacher)
        teacher_loss, _ = teacher.lm_losses(batch)
    assert largest.numel <= 256 * VOCABULARY < len(batch.target_ids) * VOCABULARY / 2
    rows = len(batch.target_ids)
    assert float(loss) / rows == pytest.approx(float(terms.terms["mlm"]), rel=1e-5)
    assert float(kl) / rows == pytest.approx(float(terms.terms["kl"]), rel=1e-4)
    with torch.no_grad():  # the library's own shifted loss, on all logits
        expected = teacher.model(input_ids=batch.input_ids[:1], labels=batch.input_ids[:1]).loss
        one = batch._replace(
            input_ids=batch.input_ids[:1],
            attention_mask=batch.attention_mask[:1],
            target_index=batch.target_index[: TOKENS - 1],
            target_ids=batch.target_ids[: TOKENS - 1],
            token_index=batch.token_index[:TOKENS],
        )
        assert float(teacher.lm_losses(one)[0]) / (TOKENS - 1) == pytest.approx(float(expected), rel=1e-5)
    assert float(teacher_loss) > 0
