"""Trust at start: whether replaced layers compute what the plain model does, padding included.

Two questions on one small padded batch: are the hidden states of every layer those of the plain model, and do other
tokens in the padding leave them alone? The second finds a mask that is ignored even where the first is within rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from homodistil.errors import UserError

LENGTHS = (32, 19, 7, 1)
"""Tokens of the probe's sequences."""
TOLERANCE = {torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.05}
"""Allowed root mean square difference in standard deviations of the plain model's states. Measured: roundings of other
kernels over 12 layers 2e-7, 9e-4 and 7e-3; GELU's tanh form 2e-4; one layer that ignores its mask 0.1."""
LEAK_TOLERANCE = 1e-3
"""The same for a change of padding alone, which a mask that works makes exactly 0: same kernels, same shapes."""

HiddenStatesOf = Callable[[Tensor, Tensor], list[Tensor]]
"""(input_ids, attention_mask) -> states of the embeddings and every layer, each (B, T, D)."""


class Probe(NamedTuple):
    """A padded batch, int64 (B, T), and the same with other tokens in the padding."""

    input_ids: Tensor
    attention_mask: Tensor
    other_padding: Tensor

    @classmethod
    def make(cls, config: PretrainedConfig, device: torch.device) -> Probe:
        generator = torch.Generator().manual_seed(0)
        num_tokens = min(max(LENGTHS), config.max_position_embeddings)
        shape = (len(LENGTHS), num_tokens)
        input_ids, others = (torch.randint(config.vocab_size, shape, generator=generator) for _ in range(2))
        attention_mask = (torch.arange(num_tokens) < torch.tensor(LENGTHS)[:, None]).long()
        other_padding = torch.where(attention_mask.bool(), input_ids, others)
        return cls(*(tensor.to(device) for tensor in (input_ids, attention_mask, other_padding)))


def check_same(found_of: HiddenStatesOf, expected: list[Tensor], probe: Probe, field: str) -> None:
    """Compare with the plain model's states `expected` on `probe`.

    Raises:
        UserError: names `field`, the first layers that are wrong, by how much, and what to do.
    """
    found = found_of(probe.input_ids, probe.attention_mask)
    repeated = found_of(probe.other_padding, probe.attention_mask)
    valid, problems = probe.attention_mask.bool(), []
    if problem := first_difference(found, expected, valid, TOLERANCE[expected[-1].dtype]):
        problems.append(f"they differ from the plain teacher's: {problem}")
    is_number = all(states[valid].isfinite().all() for states in found)
    if is_number and (problem := first_difference(repeated, found, valid, LEAK_TOLERANCE)):
        problems.append(f"padding leaks into valid tokens: other padding changes {problem}")
    if problems:
        raise UserError(
            f"{field}: DeepSpeed's layers failed the check at start: {', and '.join(problems)}; set {field}=false (the "
            f"fast ways that are right: teacher.runtime=torch or compile)"
        )


def first_difference(found: list[Tensor], expected: list[Tensor], valid: Tensor, tolerance: float) -> str | None:
    """Names the first state whose valid rows differ by more than `tolerance` (NaN differs), or None."""
    if len(found) != len(expected):
        return f"{len(found) - 1} layers instead of {len(expected) - 1}"
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        difference = relative_difference(ours[valid], theirs[valid])
        if not difference <= tolerance:
            return f"{_name(i)} by {difference:.2g} of its standard deviation (allowed {tolerance:g})"
    return None


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Root mean square difference over the standard deviation of `expected`."""
    found, expected = found.double(), expected.double()
    return float((found - expected).square().mean().sqrt() / expected.std())


def _name(i: int) -> str:
    return "the embeddings" if i == 0 else f"layer {i - 1}"
