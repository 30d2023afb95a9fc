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
    """An attention function of the library: (B, N, T, H) each, keys and values perhaps of fewer heads -> (B, T, N, H).

    Args:
        module: one with `is_causal` looks at no later position where there is no mask.
        attention_mask: bool, broadcast to (B, N, T, T), True = seen; None: all are.
        options: scaling, dropout and others of the library.
    """
    if keeps_probabilities(query.device.type, query.dtype):
        return _products(
            query, *_for_every_head(query, key, value), _seen(module, query, attention_mask), options
        ), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _seen(module: nn.Module, query: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask, with what no mask at all means to a causal module: every position sees itself and earlier ones."""
    if attention_mask is not None or not getattr(module, "is_causal", False):
        return attention_mask
    num_tokens = query.shape[2]
    return torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=query.device).tril()


def _for_every_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of groups, (B, G, T, H) -> one for each query head, (B, N, T, H)."""
    in_group = query.shape[1] // key.shape[1]
    return (key, value) if in_group == 1 else tuple(x.repeat_interleave(in_group, 1) for x in (key, value))


def _products(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, options: dict) -> Tensor:
    scores = torch.matmul(query * options["scaling"], key.transpose(-1, -2))
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(-1)
    if options.get("dropout"):
        probabilities = functional.dropout(probabilities, options["dropout"])
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous()
