"""A ridge that is left open: what rows that were not fitted say about it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from homodistil.pruning.compensation.least_squares import RIDGES, Rows, fit_linear

K, M = 12, 5


def draw(num_rows: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs of very unequal directions, and targets that are linear in them but for noise."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(K, M, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    x = torch.randn(num_rows, K, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, K).double() + 0.3
    y = x @ matrix + noise * torch.randn(num_rows, M, generator=generator, dtype=torch.float64) + 1.0
    return x, y


def linears_of(bias: bool) -> list[nn.Linear]:
    torch.manual_seed(3)
    return [nn.Linear(K, size, bias=bias, dtype=torch.float64) for size in (2, 3)]


def by_lstsq(x: Tensor, y: Tensor, start: Tensor, ridge: float, bias: bool) -> tuple[Tensor, Tensor]:
    """Weight and bias: a least-squares problem with K more rows."""
    mean_x, mean_y = (x.mean(0), y.mean(0)) if bias else (torch.zeros_like(x[0]), torch.zeros_like(y[0]))
    a = x - mean_x
    strength = (ridge * a.square().sum(0).mean()).sqrt()
    stacked = torch.cat([a, strength * torch.eye(K, dtype=torch.float64)])
    residual = torch.cat([y - mean_y - a @ start.T, torch.zeros(K, len(start), dtype=torch.float64)])
    weight = start + torch.linalg.lstsq(stacked, residual).solution.T
    return weight, mean_y - weight @ mean_x


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("num_rows", "noise"), [(160, 0.0), (29, 1.0), (29, 5.0)])
def test_the_ridge_is_that_of_the_least_error_on_the_rows_that_were_left_out(num_rows, noise, bias):
    parts = [draw(num_rows, noise, seed) for seed in range(3)]  # 29 rows: 21 are fitted and 8 left out of each
    linears = linears_of(bias)
    start = torch.cat([linear.weight.detach() for linear in linears])
    at = num_rows * 3 // 4
    x, y = (torch.cat([part[side][:at] for part in parts]) for side in (0, 1))
    x_left, y_left = (torch.cat([part[side][at:] for part in parts]) for side in (0, 1))
    errors = []
    for ridge in RIDGES:
        weight, offset = by_lstsq(x, y, start, ridge, bias)
        errors.append(float((x_left @ weight.T + offset - y_left).square().sum()))
    best = RIDGES[min(range(len(RIDGES)), key=errors.__getitem__)]
    weight, offset = by_lstsq(*(torch.cat([part[side] for part in parts]) for side in (0, 1)), start, best, bias)

    fit_linear(linears, (Rows(*part) for part in parts), None)
    torch.testing.assert_close(torch.cat([linear.weight for linear in linears]), weight, rtol=1e-8, atol=1e-8)
    if bias:
        torch.testing.assert_close(torch.cat([linear.bias for linear in linears]), offset, rtol=1e-8, atol=1e-8)


def test_more_noise_asks_for_a_larger_ridge():
    def chosen(noise: float) -> float:
        parts = [draw(29, noise, seed) for seed in range(3)]
        results = {}
        for ridge in (None, *RIDGES):
            linear = nn.Linear(K, M, dtype=torch.float64)
            nn.init.zeros_(linear.weight)
            fit_linear([linear], (Rows(*part) for part in parts), ridge)
            results[ridge] = linear.weight.detach().clone()
        return min(RIDGES, key=lambda ridge: float((results[ridge] - results[None]).abs().max()))

    assert chosen(0.0) == RIDGES[0] < chosen(20.0)


def test_rows_of_weights_count_by_their_squares():
    """A row of weight 2 is four rows, also among those that were left out."""
    x, y = draw(40, 1.0, 0)
    twice = torch.where(torch.arange(40) % 2 == 0, 1.0, 2.0).double().unsqueeze(1)
    repeated = torch.cat([torch.arange(40)[i : i + 1].repeat(1 if i % 2 == 0 else 4) for i in range(40)])
    weighted, plain = linears_of(True), linears_of(True)
    fit_linear(weighted, [Rows(x, y, twice)], None)
    fit_linear(plain, [Rows(x[repeated], y[repeated])], None)
    torch.testing.assert_close(weighted[0].weight, plain[0].weight, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(weighted[1].bias, plain[1].bias, rtol=1e-8, atol=1e-8)


def test_many_outputs_are_judged_by_random_sums_of_them():
    """200 outputs are chosen by 64 sums: what comes out is as good on the held-out rows as the best, within 1 %."""
    num_outputs, num_rows = 200, 40
    generator = torch.Generator().manual_seed(4)
    matrix = torch.randn(K, num_outputs, generator=generator, dtype=torch.float64)
    x = torch.randn(num_rows, K, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, K).double()
    y = x @ matrix + 3.0 * torch.randn(num_rows, num_outputs, generator=generator, dtype=torch.float64)
    at, start = num_rows * 3 // 4, torch.zeros(num_outputs, K, dtype=torch.float64)

    errors, whole = {}, {}
    for ridge in RIDGES:
        weight, _ = by_lstsq(x[:at], y[:at], start, ridge, False)
        errors[ridge] = float((x[at:] @ weight.T - y[at:]).square().sum())
        whole[ridge], _ = by_lstsq(x, y, start, ridge, False)
    linear = nn.Linear(K, num_outputs, bias=False, dtype=torch.float64)
    linear.weight.data.copy_(start)
    fit_linear([linear], [Rows(x, y)], None)

    distances = {ridge: float((linear.weight.detach() - whole[ridge]).abs().max()) for ridge in RIDGES}
    chosen = min(RIDGES, key=distances.__getitem__)
    assert distances[chosen] < 1e-8  # one of the candidates, fitted to all rows and all outputs
    assert errors[chosen] <= 1.01 * min(errors.values())
    assert max(errors.values()) > 1.05 * min(errors.values())  # so that a bad choice would show
