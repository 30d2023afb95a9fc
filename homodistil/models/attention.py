"""What attention puts out: torch's SDPA, or plain products where these are faster."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def keeps_probabilities(device_type: str, dtype: torch.dtype) -> bool:
    """Whether attention saves its (B, N, T, T) probabilities for backward: SDPA never does.

    Its CPU kernel in bf16 takes three times as long as plain products, forward and backward (LOG.md has the table).
    """
    return device_type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
) -> tuple[Tensor, None]:
    """An attention function of the library: (B, N, T, H) each -> (B, T, N, H).

    Args:
        attention_mask: bool, broadcast to (B, N, T, T), True = seen; None: all are.
        options: scaling, dropout and others of the library.
    """
    if keeps_probabilities(query.device.type, query.dtype):
        return _products(query, key, value, attention_mask, options), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _products(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, options: dict) -> Tensor:
    scores = torch.matmul(query * options["scaling"], key.transpose(-1, -2))
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(-1)
    if options.get("dropout"):
        probabilities = functional.dropout(probabilities, options["dropout"])
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous()
