"""A stock model as a function of tensors alone: what is traced, and what the exported graph is compared with."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_SHAPES = ((1, 1), (2, 7), (3, 16), (5, 33), (2, 128))
"""(batch, tokens) of the comparison; every row but the first is padded."""
EXAMPLE_SHAPE = (2, 8)
"""(batch, tokens) of the batch that is traced. No size is 1, which torch.export would take for a constant."""

Batch = dict[str, Tensor]
"""Name of an input -> int64, (B, T); attention_mask: 1 = token, 0 = padding."""


class Exportable(nn.Module):
    """A stock model whose inputs are the tensors `input_names`, in this order, and whose output is one tensor.

    Args:
        model: fp32 on the CPU, in evaluation mode: a backbone, or one with a head that puts out logits.
        max_tokens: longest sequence that it takes.
    """

    def __init__(self, model: nn.Module, max_tokens: int) -> None:
        super().__init__()
        self.model, self.max_tokens = model, max_tokens
        accepted, config = inspect.signature(model.forward).parameters, model.config
        self.vocab_size, self.pad_id = config.vocab_size, getattr(config, "pad_token_id", None) or 0
        # Models with one type alone (RoBERTa) have tokenizers that do not make this input.
        has_types = "token_type_ids" in accepted and getattr(config, "type_vocab_size", 0) > 1
        self.input_names = ("input_ids", "attention_mask", *(["token_type_ids"] if has_types else []))
        self._options = {"use_cache": False} if "use_cache" in accepted else {}
        self.output_name = "last_hidden_state" if _is_backbone(model) else "logits"
        if hasattr(model, "pooler") and self.output_name == "last_hidden_state":
            model.pooler = None  # not part of last_hidden_state, and random in most checkpoints
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor:
        """`last_hidden_state` (B, T, D), or logits (B, T, vocabulary or labels) or (B, labels).

        Args:
            inputs: the values of a `Batch`.
        """
        return self.model(**dict(zip(self.input_names, inputs, strict=True)), **self._options)[self.output_name]

    def num_parameters(self) -> int:
        """Tied parameters once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def batch(self, num_sequences: int, num_tokens: int, seed: int = 0, padded: bool = True) -> Batch:
        """`random_batch` of the model's inputs."""
        batch = random_batch(num_sequences, num_tokens, self.vocab_size, self.pad_id, seed, padded)
        return {name: batch[name] for name in self.input_names}

    def comparison_batches(self) -> Iterator[Batch]:
        """Padded random batches of several sizes and lengths, the same ones each time."""
        for seed, (num_sequences, num_tokens) in enumerate(_SHAPES):
            yield self.batch(num_sequences, min(num_tokens, self.max_tokens), seed)


def random_batch(
    num_sequences: int, num_tokens: int, vocab_size: int, pad_id: int = 0, seed: int = 0, padded: bool = True
) -> Batch:
    """Random tokens; if `padded`, every row but the first ends with padding, the last row with the most."""
    draw = torch.Generator().manual_seed(seed)
    shape = (num_sequences, num_tokens)
    num_padding = torch.arange(num_sequences) * (num_tokens // 2) // max(num_sequences - 1, 1) * padded
    mask = torch.arange(num_tokens) < num_tokens - num_padding[:, None]
    ids = torch.randint(vocab_size, shape, generator=draw).masked_fill(~mask, pad_id)
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "token_type_ids": torch.randint(2, shape, generator=draw),
    }


def _is_backbone(model: nn.Module) -> bool:
    return model.base_model is model
