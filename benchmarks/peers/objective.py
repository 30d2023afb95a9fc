"""The loss and the update of the peers that bring no training loop of their own, as a careful user writes them.

Terms and weights: see workload.py. All sums in fp32 where the library does not decide otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.peers.workload import BETAS, CLIPPING, EPSILON, LEARNING_RATE, WEIGHT_DECAY


def selections(count: int, kept: Tensor, width: int, columns: int) -> nn.ModuleList:
    """`count` learned projections, Linear(columns, width): at first they put the student's dims where they were.

    Args:
        kept: teacher dim of each student dim, int64.
        columns: width of the student's hidden states: len(kept), or `width` where pruned dims are only masked.
    """
    weight = torch.zeros(width, columns)
    weight[kept, kept if columns == width else torch.arange(len(kept))] = 1.0
    layers = nn.ModuleList(nn.Linear(columns, width, bias=False) for _ in range(count))
    for layer in layers:
        layer.weight.data.copy_(weight)
    return layers


def vocabulary_terms(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(CE, KL(teacher || student)): means over rows with a label and over all rows.

    Args:
        student, teacher: logits (R, V). labels: (R,), -100 = none.
    """
    student_log, teacher_log = (functional.log_softmax(logits.float(), -1) for logits in (student, teacher))
    kl = functional.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)
    return functional.nll_loss(student_log, labels, ignore_index=-100), kl


def hidden_term(student: Sequence[Tensor], teacher: Sequence[Tensor], projections: Iterable[nn.Module], mask: Tensor):
    """Sum over the pairs of the MSE over valid tokens. Hidden states (B, T, D), mask (B, T)."""
    valid = mask[:, :, None]
    parts = []
    for states, wanted, projection in zip(student, teacher, projections, strict=True):
        squared = functional.mse_loss(projection(states).float(), wanted.float(), reduction="none")
        parts.append((squared * valid).sum() / (mask.sum() * wanted.shape[-1]))
    return torch.stack(parts).sum()


def attention_term(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Sum over layers of the MSE over heads and valid pairs. Probabilities (B, N, T, T) of the same heads."""
    pairs = (mask[:, :, None] * mask[:, None, :])[:, None]
    parts = []
    for scores, wanted in zip(student, teacher, strict=True):
        squared = functional.mse_loss(scores.float(), wanted.float(), reduction="none")
        parts.append((squared * pairs).sum() / (pairs.sum() * scores.shape[1]))
    return torch.stack(parts).sum()


def adamw(modules: Sequence[nn.Module]) -> torch.optim.AdamW:
    """torch's fused AdamW: decay for matrices of the model (the first module) only."""
    model = list(modules[0].parameters())
    projections = [parameter for module in modules[1:] for parameter in module.parameters()]
    groups = [
        {"params": [p for p in model if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model if p.ndim == 1] + projections, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)


def update(total: Tensor, optimizer: torch.optim.Optimizer, schedule) -> None:
    """Backward, clipping, step."""
    total.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], CLIPPING)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)
