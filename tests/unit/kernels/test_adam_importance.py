"""AdamW with importance in one pass: torch's form and Triton's against torch's AdamW and whole matrices in float64."""

from __future__ import annotations

import pytest
import torch

from homodistil.kernels.adam_importance import AdamSettings, Segment, SegmentTable, adamw_with_sums_

SETTINGS = AdamSettings(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=0.1)
NUM_STEPS = 3
interpreted = pytest.mark.interpreted
FORMS = [pytest.param("torch"), pytest.param("triton", marks=interpreted)]

# Rows and columns; None: not scored. More than one block of rows (32) and of columns (128), and odd.
MATRICES = [(37, 131, "both"), (1, 33, "columns"), (5, 7, None), (70, 20, "rows"), (3, 150, "columns")]
ALIGNED_MATRICES = [(40, 132, "both"), (1, 32, "columns"), (4, 8, None), (36, 20, "rows")]
TALL_MATRICES = [(1100, 3, "both"), (70, 65, "both")]
"""More blocks of rows than are added up at once."""


class Flat:
    """Matrices end to end, with a gap before the third and one at the end, as ZeRO pads."""

    def __init__(self, matrices, gap):
        torch.manual_seed(0)
        self.places, self.sums_at, position, self.num_sums = [], [], 0, 0
        for i, (rows, columns, scored) in enumerate(matrices):
            position += gap if i == 2 else 0
            self.places.append((position, rows, columns))
            position += rows * columns
            sizes = {"both": (rows, columns), "rows": (rows, 0), "columns": (0, columns), None: (0, 0)}[scored]
            at = []
            for size in sizes:
                at.append(self.num_sums if size else -1)
                self.num_sums += size
            self.sums_at.append(at)
        self.numel = position + gap
        self.weight = torch.randn(self.numel)
        self.gradients = [torch.randn(self.numel) * 0.1 for _ in range(NUM_STEPS)]

    def table(self, begin, end):
        """Of the partition [begin, end)."""
        found = []
        for (position, rows, columns), (rows_at, columns_at) in zip(self.places, self.sums_at, strict=True):
            a, b = max(begin, position), min(end, position + rows * columns)
            if a < b and max(rows_at, columns_at) >= 0:
                found.append(Segment(a - begin, b - a, a - position, columns, rows_at, columns_at))
        return SegmentTable(found, end - begin)

    def expected_sums(self, weight, gradient):
        scores, sums = (weight.double() * gradient.double()).abs(), torch.zeros(self.num_sums, dtype=torch.float64)
        for (position, rows, columns), (rows_at, columns_at) in zip(self.places, self.sums_at, strict=True):
            matrix = scores[position : position + rows * columns].view(rows, columns)
            if rows_at >= 0:
                sums[rows_at : rows_at + rows] = matrix.sum(1)
            if columns_at >= 0:
                sums[columns_at : columns_at + columns] = matrix.sum(0)
        return sums


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize(
    ("matrices", "gap", "num_ranks"), [(MATRICES, 3, 3), (ALIGNED_MATRICES, 4, 2), (TALL_MATRICES, 0, 1)]
)
def test_update_and_sums_over_ranks_that_cut_rows(implementation, matrices, gap, num_ranks):
    flat = Flat(matrices, gap)
    reference = flat.weight.double().requires_grad_()
    optimizer = torch.optim.AdamW(
        [reference], lr=SETTINGS.lr, betas=(0.9, 0.999), eps=SETTINGS.eps, weight_decay=SETTINGS.weight_decay
    )
    share = -(-flat.numel // num_ranks)
    edges = [(begin, min(begin + share, flat.numel)) for begin in range(0, flat.numel, share)]
    parts = [flat.weight[begin:end].clone() for begin, end in edges]
    states = [(torch.zeros_like(part), torch.zeros_like(part)) for part in parts]
    tables = [flat.table(*edge) for edge in edges]
    for step, gradient in enumerate(flat.gradients, 1):
        expected = flat.expected_sums(torch.cat(parts), gradient)
        found = torch.zeros(flat.num_sums)
        for part, state, table, (begin, end) in zip(parts, states, tables, edges, strict=True):
            sums, count = torch.zeros(flat.num_sums), torch.tensor(float(step))
            adamw_with_sums_(part, gradient[begin:end], *state, count, SETTINGS, table, sums, implementation)
            found += sums
        reference.grad = gradient.double()
        optimizer.step()
        # fp32 sums of positive terms.
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    # fp32 weights of about 1: rounding at each of three updates of lr 1e-2.
    torch.testing.assert_close(torch.cat(parts).double(), reference.detach(), rtol=0, atol=1e-6)
    # Gradients of about 0.1, whose average cancels; squares do not.
    for i, (key, atol) in enumerate({"exp_avg": 2e-8, "exp_avg_sq": 0.0}.items()):
        moments = torch.cat([state[i] for state in states])
        torch.testing.assert_close(moments.double(), optimizer.state[reference][key], rtol=1e-6, atol=atol)


@interpreted
def test_the_same_gradients_give_the_same_sums_bit_by_bit():
    flat = Flat(MATRICES, 3)
    found = []
    for _ in range(2):
        sums, states = torch.zeros(flat.num_sums), [torch.zeros(flat.numel) for _ in range(2)]
        tensors = (flat.weight.clone(), flat.gradients[0], *states)
        adamw_with_sums_(*tensors, torch.tensor(1.0), SETTINGS, flat.table(0, flat.numel), sums, "triton")
        found.append(sums)
    assert torch.equal(*found)


def test_a_tensor_longer_than_a_block(monkeypatch):
    """Rows of several blocks, an update in each: as one whole."""
    monkeypatch.setattr("homodistil.kernels.score_sums.BLOCK_NUMEL", 500)
    torch.manual_seed(0)
    weight, gradient = torch.randn(23 * 101), torch.randn(23 * 101)
    numel, start = len(weight) - 160, 60
    expected = (weight.double() * gradient.double()).abs()
    expected[:start] = expected[start + numel :] = 0
    expected = expected.view(23, 101)
    sums, part = torch.zeros(23 + 101), weight[start : start + numel].clone()
    table = SegmentTable([Segment(0, numel, start, 101, rows_at=0, columns_at=23)], numel)
    moments = [torch.zeros(numel) for _ in range(2)]
    own = gradient[start : start + numel]
    adamw_with_sums_(part, own, *moments, torch.tensor(1.0), SETTINGS, table, sums, "torch")
    torch.testing.assert_close(sums.double(), torch.cat([expected.sum(1), expected.sum(0)]), rtol=1e-6, atol=0)
    # At the first step every element moves by lr against the sign of its gradient, after decay.
    moved = weight[start : start + numel] * (1 - 1e-3) - 1e-2 * own.sign()
    torch.testing.assert_close(part, moved, rtol=0, atol=1e-4)


def test_segments_that_overlap_or_share_their_sums_are_refused():
    with pytest.raises(ValueError, match="overlaps"):
        SegmentTable([Segment(0, 10, 0, 5, 0, 2), Segment(9, 5, 0, 5, 7, 9)], 20)
    with pytest.raises(ValueError, match="overlaps"):
        SegmentTable([Segment(15, 10, 0, 5, 0, 2)], 20)
    with pytest.raises(ValueError, match="one matrix"):
        SegmentTable([Segment(0, 5, 0, 5, 0, 2), Segment(5, 5, 5, 5, 0, 2)], 20)
