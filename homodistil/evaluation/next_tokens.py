"""Held-out causal language modelling: loss, perplexity, bits per byte, and KL to the teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from homodistil.data.batch import Batch
from homodistil.distributed import ranks

Losses = Callable[[Batch], tuple[Tensor, Tensor]]
"""Batch -> sums over its predicted rows of the cross-entropy and of KL(teacher || model) (0: no teacher), nats."""


@torch.no_grad()
def evaluate_next_tokens(
    losses: Losses, has_teacher: bool, batches: Iterable[Batch], token_bytes: Tensor, device: torch.device
) -> dict[str, float]:
    """Means over all predicted tokens of all ranks' batches. Every rank calls it.

    Args:
        losses: of the model under test.
        has_teacher: whether `losses` compares with one.
        batches: this rank's share (`fixed_batches`).
        token_bytes: bytes of text of each token id, int64 (V,) on the CPU (data/token_bytes.py).

    Returns:
        lm_loss (nats per token), perplexity (its exponential), bits_per_byte (comparable between tokenizers),
        kl_to_teacher (nats), predicted_tokens (count).
    """
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in batches:
        num_bytes, rows = token_bytes[batch.target_ids].sum(), torch.tensor(len(batch.target_ids))
        parts = (*losses(batch.to(device)), num_bytes, rows)
        sums += torch.stack([part.double().to(device) for part in parts])
    loss, kl, num_bytes, rows = ranks.total(sums).tolist()
    result = {
        "lm_loss": loss / rows,
        "perplexity": math.exp(min(loss / rows, 700)),  # of more, a float has no exponential
        "bits_per_byte": loss / math.log(2) / max(num_bytes, 1),
        "predicted_tokens": rows,
    }
    return result | ({"kl_to_teacher": kl / rows} if has_teacher else {})
