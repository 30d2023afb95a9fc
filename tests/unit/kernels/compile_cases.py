"""What compile_worker.py compiles: the public operations on tensors of the product's shapes, forward and backward.

Only extents that a kernel is specialised on are real (head dims, tokens, vocabulary, dtypes); batches are as small as
they can be, since nothing runs and outputs are whatever the memory holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from homodistil.kernels.attention_map import TARGETS, attention_map_loss
from homodistil.kernels.attention_map_inputs import MaskKind
from homodistil.kernels.masked_lm import linear_masked_lm_losses, masked_lm_losses

VOCABULARY = 30522
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    name: str
    launch: Callable[[], None]
    is_representative: bool
    """Part of the default run; the others belong to the full matrix."""


# -- attention maps


def attention(target: str, num_tokens: int, head_dim: int, dtype: str, num_teacher_heads: int = 3) -> None:
    """Heads of 64 in the teacher, its first two left in the student; Q and K as models have them: strided views."""
    student = [heads(2, num_tokens, head_dim, dtype).requires_grad_() for _ in range(2)]
    teacher = [heads(num_teacher_heads, num_tokens, 64, dtype) for _ in range(2)]
    mask = torch.ones(2, num_tokens, dtype=torch.int64)
    head_map = torch.arange(2) if num_teacher_heads > 2 else None
    loss = attention_map_loss(*student, *teacher, 0.125, 0.125, mask, head_map, target, "triton")
    loss.backward()


def decoder(target: str, num_tokens: int, dims: int, dtype: str, kind: MaskKind, groups: tuple[int, int]) -> None:
    """Four heads of the teacher's six; in student and teacher `groups` of them share a head of keys."""
    student = [heads(n, num_tokens, dims, dtype).requires_grad_() for n in (4, 4 // groups[0])]
    teacher = [heads(n, num_tokens, dims, dtype) for n in (6, 6 // groups[1])]
    mask, head_map = torch.ones(2, num_tokens, dtype=torch.int64), torch.tensor([0, 1, 4, 5])
    scale, window = dims**-0.5, kind.window
    loss = attention_map_loss(
        *student, *teacher, scale, scale, mask, head_map, target, "triton", causal=kind.causal, window=window
    )
    loss.backward()


def heads(num_heads: int, num_tokens: int, head_dim: int, dtype: str) -> Tensor:
    """(B, N, T, H) out of (B, T, N * H)."""
    return tensor(2, num_tokens, num_heads, head_dim, dtype=dtype).transpose(1, 2)


HEAD_DIMS, NUM_TOKENS = (64, 48, 32, 28, 20), (64, 128, 512)
USUAL_ATTENTION = {
    ("scores", 512, 64, "bf16"),
    ("scores", 128, 20, "bf16"),
    ("scores", 512, 64, "fp32"),
    ("centred_scores", 128, 64, "bf16"),
    ("centred_scores", 512, 64, "bf16"),
    ("probabilities", 128, 64, "bf16"),
    ("probabilities", 512, 48, "fp16"),
    ("probabilities_kl", 64, 32, "fp16"),
    ("probabilities_kl", 512, 64, "bf16"),
}


def attention_cases() -> list[Case]:
    found = []
    for settings in itertools.product(TARGETS, NUM_TOKENS, HEAD_DIMS, DTYPES):
        target, num_tokens, head_dim, dtype = settings
        name = f"{target} T={num_tokens} H={head_dim} {dtype}"
        found.append(Case(name, lambda s=settings: attention(*s), settings in USUAL_ATTENTION))
    whole = Case("scores T=128 H=64 bf16, no head map", lambda: attention("scores", 128, 64, "bf16", 2), False)
    return [*found, whole]


CAUSAL, WINDOW = MaskKind(causal=True), MaskKind(window=64)
KINDS = (CAUSAL, WINDOW, MaskKind(True, 64))
USUAL_DECODERS = {
    ("scores", 512, 64, "bf16", CAUSAL, (1, 1)),
    ("centred_scores", 512, 64, "bf16", WINDOW, (2, 2)),
    ("probabilities_kl", 512, 128, "bf16", CAUSAL, (2, 2)),
    ("probabilities", 64, 64, "bf16", WINDOW, (1, 2)),
}


def decoder_cases() -> list[Case]:
    """Kinds of mask, and keys that are shared in both, in the teacher alone or not at all.

    Without fp32, of which `configuration` says that a few spill.
    """
    found = []
    long = itertools.product(TARGETS, (512,), (64, 128), ("bf16",), KINDS, ((1, 1), (2, 2)))
    short = itertools.product(TARGETS, (64, 128), (64,), ("bf16",), (CAUSAL, WINDOW), ((1, 2),))
    whole = itertools.product(TARGETS, (512,), (64,), ("bf16",), (MaskKind(),), ((1, 2), (2, 2)))
    for settings in [*long, *short, *whole, ("probabilities", 512, 20, "fp16", WINDOW, (2, 2))]:
        target, num_tokens, dims, dtype, kind, groups = settings
        name = f"{target} T={num_tokens} H={dims} {dtype} {kind} {groups}"
        found.append(Case(name, lambda s=settings: decoder(*s), settings in USUAL_DECODERS))
    return found


# -- vocabulary


def rows(dtype: str, temperature: float) -> None:
    student, teacher = (tensor(37, VOCABULARY, dtype=dtype) for _ in range(2))
    student.requires_grad_()
    ce, kl = masked_lm_losses(student, teacher, labels(37), temperature, "triton")
    (ce + kl).backward()


def rows_without_teacher(dtype: str) -> None:
    student = tensor(37, VOCABULARY, dtype=dtype).requires_grad_()
    ce, _ = masked_lm_losses(student, None, labels(37), 1.0, "triton")
    ce.backward()


def linear(dtype: str, temperature: float) -> None:
    heads = [tensor(*shape, dtype=dtype) for shape in ((5, 16), (VOCABULARY, 16), (VOCABULARY,)) * 2]
    for leaf in heads[:3]:
        leaf.requires_grad_()
    factor = torch.ones(())
    total, _, _ = linear_masked_lm_losses(*heads, labels(5), factor, factor, temperature, implementation="triton")
    total.backward()


def tensor(*shape: int, dtype: str) -> Tensor:
    return torch.zeros(*shape, dtype=DTYPES[dtype])


def labels(num_rows: int) -> Tensor:
    return torch.zeros(num_rows, dtype=torch.int64)


def vocabulary_cases() -> list[Case]:
    found = []
    for dtype, temperature in itertools.product(DTYPES, (1.0, 2.0)):
        usual = (dtype, temperature) in (("bf16", 1.0), ("fp32", 2.0))
        found.append(Case(f"CE + KL {dtype} T={temperature:g}", lambda d=dtype, t=temperature: rows(d, t), usual))
        found.append(Case(f"decoder {dtype} T={temperature:g}", lambda d=dtype, t=temperature: linear(d, t), usual))
    return found + [Case(f"CE {dtype}", lambda d=dtype: rows_without_teacher(d), dtype == "bf16") for dtype in DTYPES]


CASES = attention_cases() + decoder_cases() + vocabulary_cases()
