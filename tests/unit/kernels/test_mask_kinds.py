"""The attention-map loss of decoders and of sliding windows, with keys that several heads of queries share.

The reference is float64 and naive: an explicit mask of every pair, keys repeated for every head of queries, whole maps,
and autograd for the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from unit.kernels.test_attention_map import GRADIENT_TOLERANCE, LOSS_TOLERANCE

from homodistil.errors import UserError
from homodistil.kernels.attention_map import TARGETS, attention_map_loss
from homodistil.kernels.attention_map_inputs import MaskKind, num_pairs


class Case(NamedTuple):
    num_tokens: int
    student_heads: tuple[int, int]
    """Of queries and of keys."""
    teacher_heads: tuple[int, int]
    dims: tuple[int, int]
    """Of a head of the student and of the teacher."""
    causal: bool
    window: int | None
    heads: tuple[int, ...] | None = None


SHORT = [
    Case(17, (3, 3), (3, 3), (24, 8), True, None),  # a whole map in one tile
    Case(17, (4, 2), (4, 2), (8, 24), True, None),
    Case(17, (4, 1), (4, 1), (24, 24), False, 5),
    Case(17, (4, 1), (8, 2), (8, 24), True, 5, (0, 3, 4, 6)),  # the student's one head of keys, two of the teacher's
    Case(17, (4, 4), (6, 3), (24, 8), True, 1, (5, 0, 2, 3)),  # a query sees itself alone
    Case(17, (6, 3), (4, 1), (24, 8), False, 17, (3, 1, 0, 2, 2, 1)),
    Case(17, (4, 2), (4, 2), (8, 8), True, 40),
    Case(17, (4, 1), (4, 4), (24, 8), False, None),
]
LONG = [
    Case(
        140, (2, 2), (2, 2), (24, 8), False, 20
    ),  # blocks of 64 rows and keys: some hidden, some seen in part or whole
    Case(140, (4, 2), (4, 1), (8, 24), True, None),
    Case(140, (2, 1), (4, 2), (24, 8), True, 70, (3, 0)),
    Case(140, (2, 2), (2, 1), (8, 24), True, 65),
]


class Inputs(NamedTuple):
    """Texts: one with padding behind, one with padding in front and in between, one of padding alone."""

    case: Case
    student: list[Tensor]
    """(B, N, T, Hs), (B, Gs, T, Hs), views of (B, T, N, Hs)."""
    teacher: list[Tensor]
    mask: Tensor
    heads: Tensor | None

    @property
    def scales(self) -> list[float]:
        return [dims**-0.5 for dims in self.case.dims]

    def loss(self, target: str, implementation: str) -> Tensor:
        case = self.case
        return attention_map_loss(
            *self.student,
            *self.teacher,
            *self.scales,
            self.mask,
            self.heads,
            target,
            implementation,
            causal=case.causal,
            window=case.window,
        )


def make(case: Case, dtype: torch.dtype, texts: Sequence[int] = (0, 1, 2)) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def tensor(num_heads: int, dims: int) -> Tensor:
        shape = (len(texts), case.num_tokens, num_heads, dims)
        return (1.5 * torch.randn(shape, generator=generator)).to(dtype).transpose(1, 2)

    student = [tensor(n, case.dims[0]).requires_grad_() for n in case.student_heads]
    teacher = [tensor(n, case.dims[1]) for n in case.teacher_heads]
    mask = torch.ones(3, case.num_tokens, dtype=torch.int64)
    mask[0, case.num_tokens * 2 // 3 :] = 0
    mask[1, : case.num_tokens // 4] = 0
    mask[1, case.num_tokens // 2] = 0
    mask[2] = 0
    return Inputs(case, student, teacher, mask[list(texts)], None if case.heads is None else torch.tensor(case.heads))


def seen_pairs(num_tokens: int, causal: bool, window: int | None) -> Tensor:
    """(T, T) bool, pair by pair."""
    seen = torch.ones(num_tokens, num_tokens, dtype=torch.bool)
    for i in range(num_tokens):
        for j in range(num_tokens):
            if causal and j > i:
                seen[i, j] = False
            if window is not None and (i - j >= window if causal else abs(i - j) > window):
                seen[i, j] = False
    return seen


def reference(inputs: Inputs, target: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and gradients, float64."""
    case = inputs.case
    student = [x.detach().double().requires_grad_() for x in inputs.student]
    maps = []
    for (queries, keys), scale in zip((student, [x.double() for x in inputs.teacher]), inputs.scales, strict=True):
        keys = torch.cat(
            [keys[:, n // (queries.shape[1] // keys.shape[1])][:, None] for n in range(queries.shape[1])], 1
        )
        maps.append(torch.einsum("bnih,bnjh->bnij", queries, keys) * scale)
    ours, theirs = maps
    theirs = theirs if case.heads is None else theirs[:, list(case.heads)]
    tokens = inputs.mask.bool()
    seen = seen_pairs(case.num_tokens, case.causal, case.window) & tokens[:, None, None, :]
    seen = seen.expand_as(ours)
    valid = seen & tokens[:, None, :, None]
    if target.startswith("probabilities"):
        # A row that sees nothing is one of padding.
        ours, theirs = (x.masked_fill(~seen, -torch.inf).masked_fill(~valid.any(-1, True), 0.0) for x in (ours, theirs))
    if target == "probabilities_kl":
        ours, theirs = (x.log_softmax(-1).masked_fill(~valid, 0.0) for x in (ours, theirs))
        terms = theirs.exp() * (theirs - ours)
    elif target == "probabilities":
        terms = (ours.softmax(-1) - theirs.softmax(-1)) ** 2
    elif target == "centred_scores":
        num_seen = seen.sum(-1, keepdim=True).clamp(min=1)
        ours, theirs = (x - (x * seen).sum(-1, keepdim=True) / num_seen for x in (ours, theirs))
        terms = (ours - theirs) ** 2
    else:
        terms = (ours - theirs) ** 2
    total = terms.masked_fill(~valid, 0.0).sum() / ours.shape[1]
    return total, torch.autograd.grad(total, student)


def check(inputs: Inputs, target: str, implementation: str) -> None:
    """Tolerances are those of test_attention_map.py, for its reasons: a pair that is hidden adds exactly 0."""
    expected, expected_gradients = reference(inputs, target)
    loss = inputs.loss(target, implementation)
    torch.testing.assert_close(loss.double(), expected, rtol=LOSS_TOLERANCE, atol=0)
    gradients = torch.autograd.grad(loss, inputs.student)
    for gradient, wanted, leaf in zip(gradients, expected_gradients, inputs.student, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        error = (gradient.double() - wanted).norm()
        assert error <= GRADIENT_TOLERANCE[leaf.dtype] * wanted.norm(), f"{error / wanted.norm():.1e}"
        assert not gradient[(inputs.mask == 0)[:, None, :, None].expand_as(gradient)].any()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SHORT + LONG, ids=str)
def test_torch(case, dtype, target):
    check(make(case, dtype), target, "torch")


def equal(inputs: Inputs, heads: list[int] | None = None) -> Inputs:
    """A teacher that is the student."""
    teacher = [x.detach().clone() for x in inputs.student]
    heads = None if heads is None else torch.tensor(heads)
    case = inputs.case._replace(dims=(inputs.case.dims[0],) * 2)
    return inputs._replace(case=case, teacher=teacher, heads=heads)


def check_zero(inputs: Inputs, target: str, implementation: str) -> None:
    loss = inputs.loss(target, implementation)
    assert loss.item() == 0.0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, inputs.student))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("named", [False, True], ids=["no head map", "head map"])
@pytest.mark.parametrize("case", SHORT + LONG, ids=str)
def test_torch_student_that_equals_its_teacher(case, named, target):
    check_zero(equal(make(case, torch.float32), list(range(case.student_heads[0])) if named else None), target, "torch")


# The interpreter is slow: of most cases one text, and of the long ones, with padding in front, one target or two. Which
# pairs are seen and what is compared are two choices of one kernel: from the third case on two targets, in turn; the
# other two in `make test-full`.
SHORT_INTERPRETED = [
    pytest.param(
        case,
        [torch.bfloat16, torch.float32][i % 2],
        [0, 1] if i < 2 else [i % 2],
        target,
        marks=[pytest.mark.full] if i > 1 and (i + j) % 2 else [],
    )
    for i, case in enumerate(SHORT)
    for j, target in enumerate(TARGETS)
]
LONG_INTERPRETED = [*zip(LONG, TARGETS, strict=True), (LONG[0], "centred_scores")]


@pytest.mark.interpreted
@pytest.mark.parametrize("case, dtype, texts, target", SHORT_INTERPRETED, ids=str)
def test_triton(case, dtype, texts, target):
    check(make(case, dtype, texts), target, "triton")


@pytest.mark.interpreted
@pytest.mark.parametrize("case, target", LONG_INTERPRETED, ids=str)
def test_triton_of_several_blocks(case, target):
    check(make(case, torch.bfloat16, [1]), target, "triton")


@pytest.mark.interpreted
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", [SHORT[0], SHORT[3]], ids=str)  # one tile; blocks, as keys are shared
def test_triton_student_that_equals_its_teacher(case, target):
    check_zero(equal(make(case, torch.bfloat16, [0])), target, "triton")


@pytest.mark.interpreted
@pytest.mark.parametrize("causal, window", [(True, None), (False, 20)])
def test_triton_passes_over_hidden_blocks(causal, window):
    """0 * NaN would show in the gradients: of the first queries from the last keys, and the other way round."""
    case = Case(140, (1, 1), (1, 1), (8, 8), causal, window)
    inputs, others = (make(case, torch.bfloat16, [1]) for _ in range(2))
    inputs.student[1].data[:, :, 128:] = torch.nan
    of_queries, _ = torch.autograd.grad(inputs.loss("scores", "triton"), inputs.student)
    assert of_queries[:, :, :64].isfinite().all()
    others.student[0].data[:, :, :64] = torch.nan
    _, of_keys = torch.autograd.grad(others.loss("scores", "triton"), others.student)
    assert of_keys[:, :, 128:].isfinite().all()


# -- which pairs are seen, and how many


KINDS = [MaskKind(causal, window) for causal in (False, True) for window in (None, 1, 3, 16, 17, 40)] + [
    MaskKind(False, 0)
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_kind_is_what_transformers_masks(kind):
    from transformers import masking_utils  # seconds, which the interpreter's process does without

    positions = torch.arange(17)
    if kind.causal:
        function = masking_utils.causal_mask_function
        if kind.window is not None:
            function = masking_utils.sliding_window_causal_mask_function(kind.window)
    else:
        function = masking_utils.bidirectional_mask_function
        if kind.window is not None:
            function = masking_utils.sliding_window_bidirectional_mask_function(kind.window)
    wanted = function(0, 0, positions[:, None], positions[None, :]).expand(17, 17)
    assert torch.equal(seen_pairs(17, kind.causal, kind.window), wanted)
    assert torch.equal(kind.clear_hidden(torch.ones(17, 17)).bool(), wanted)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_num_pairs(kind):
    lengths = np.array([[0, 1, 2, 3], [5, 16, 17, 30]])
    each = [int(seen_pairs(length, kind.causal, kind.window).sum()) for length in lengths.flat]
    assert [num_pairs(int(length), kind) for length in lengths.flat] == each
    assert num_pairs(lengths, kind) == num_pairs(lengths.astype(np.int32), kind) == sum(each)
    assert num_pairs(torch.from_numpy(lengths), kind) == sum(each)
    assert num_pairs([], kind) == 0


def test_num_pairs_is_exact_where_floats_are_not():
    length = 2**27 + 1
    assert num_pairs([length, 1]) == length**2 + 1
    assert num_pairs([length, 1], MaskKind(causal=True)) == length * (length + 1) // 2 + 1


def test_mistakes_are_named():
    case = SHORT[0]
    with pytest.raises(UserError, match="attention window: found 0, allowed 1 or more"):
        make(case._replace(window=0), torch.float32).loss("scores", "torch")
    with pytest.raises(UserError, match="4 query heads cannot share 3 key heads equally"):
        make(case._replace(student_heads=(4, 3)), torch.float32).loss("scores", "torch")
