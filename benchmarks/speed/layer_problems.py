"""Operations on a layer's outputs: the attention-map loss, and the hidden-state MSE with its projection."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.speed.kernel_problem import Inputs, Problem, Variant, homodistil_variants, randn
from homodistil.kernels.attention_map import attention_map_loss
from homodistil.kernels.hidden_mse import hidden_mse
from homodistil.kernels.normalised_hidden_mse import EPS, normalised_hidden_mse

TARGETS = ["scores", "centred_scores", "probabilities", "probabilities_kl"]


def _mask(num_rows: int, num_tokens: int, device: torch.device) -> Tensor:
    """A batch of real text: the last quarter of the rows is padded by a third."""
    mask = torch.ones(num_rows, num_tokens, dtype=torch.int64, device=device)
    mask[num_rows - num_rows // 4 :, num_tokens * 2 // 3 :] = 0
    return mask


def attention_problem(b: int, n: int, t: int, hs: int, ht: int, target: str, device: torch.device) -> Problem:
    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        student = {name: randn(b, n, t, hs, device=device, dtype=dtype) for name in ("qs", "ks")}
        teacher = {name: randn(b, n, t, ht, device=device, dtype=dtype) for name in ("qt", "kt")}
        return student | teacher | {"mask": _mask(b, t, device)}

    def ours(implementation: str) -> Variant:
        def run(x: Inputs) -> Tensor:
            scales = hs**-0.5, ht**-0.5
            return attention_map_loss(
                x["qs"], x["ks"], x["qt"], x["kt"], *scales, x["mask"], target=target, implementation=implementation
            )

        return run

    return Problem(
        operation=f"attention map, {target}",
        shape=f"B{b} N{n} T{t} H{hs}/{ht}",
        make=make,
        leaves=("qs", "ks"),
        variants={"eager": lambda x: eager_attention(x, target)} | homodistil_variants(ours, device),
        flops=2.0 * b * n * t * t * (3 * hs + ht),
        elements=b * n * t * (4 * hs + 2 * ht),
    )


def eager_attention(x: Inputs, target: str) -> Tensor:
    """With all maps in memory; sums over valid pairs (rows for KL), mean over heads."""
    valid = x["mask"].bool()
    maps = [torch.matmul(q, k.transpose(-1, -2)) for q, k in ((x["qs"], x["ks"]), (x["qt"], x["kt"]))]
    student, teacher = (
        scores.float() * q.shape[-1] ** -0.5 for scores, q in zip(maps, (x["qs"], x["qt"]), strict=True)
    )
    pairs = valid[:, :, None] & valid[:, None, :]
    if target == "centred_scores":
        keys = valid[:, None, None, :]
        student, teacher = (s - (s * keys).sum(-1, True) / keys.sum(-1, True).clamp(min=1) for s in (student, teacher))
    if target in ("scores", "centred_scores"):
        return ((student - teacher).square().mean(1) * pairs).sum()
    padding, lowest = ~valid[:, None, None, :], torch.finfo(torch.float32).min
    log_q, log_p = (scores.masked_fill(padding, lowest).log_softmax(-1) for scores in (student, teacher))
    if target == "probabilities":
        return ((log_q.exp() - log_p.exp()).square().mean(1) * pairs).sum()
    return ((log_p.exp() * (log_p - log_q)).mean(1) * pairs).sum()


def hidden_problem(b: int, t: int, ds: int, dt: int, device: torch.device, space: str) -> Problem:
    distance = {"raw": hidden_mse, "normalised": normalised_hidden_mse}[space]

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        inputs = {"student": randn(b, t, ds, device=device, dtype=dtype), "mask": _mask(b, t, device)}
        inputs["teacher"] = randn(b, t, dt, device=device, dtype=dtype)
        return inputs | {"weight": randn(dt, ds, device=device, dtype=dtype, scale=ds**-0.5)}

    def eager(x: Inputs) -> Tensor:
        both = functional.linear(x["student"], x["weight"]).float(), x["teacher"].float()
        if space == "normalised":
            both = (rows * (rows.square().mean(-1, True) + EPS).rsqrt() for rows in both)
        student, teacher = both
        squared = (student - teacher).square().mean(-1)
        return (squared * x["mask"]).sum()

    def ours(x: Inputs) -> Tensor:
        return distance(x["student"], x["teacher"], x["mask"], x["weight"], "student")

    return Problem(
        operation=f"hidden MSE with projection, {space}",
        shape=f"B{b} T{t} D{ds}/{dt}",
        make=make,
        leaves=("student", "weight"),
        variants={"eager": eager, "homodistil": ours},
        flops=2.0 * b * t * 3 * ds * dt,
        elements=b * t * (2 * ds + dt) + 2 * ds * dt,
    )
