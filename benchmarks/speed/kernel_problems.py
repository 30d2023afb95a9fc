"""The operations that kernels.py compares: shapes, inputs, and each variant as a function from inputs to a loss.

`eager` is the formula in plain torch, with all its matrices. FLOPs are those of the eager formula and bytes the least
any way has to move (inputs read once, gradients written once): both are the same for every variant of a problem.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from homodistil.kernels.attention_map import attention_map_loss
from homodistil.kernels.hidden_mse import hidden_mse
from homodistil.kernels.masked_lm import linear_masked_lm_losses, masked_lm_losses
from homodistil.kernels.normalised_hidden_mse import EPS, normalised_hidden_mse

VOCABULARY = 30522
TEMPERATURE = 2.0
Inputs = dict[str, Tensor]
Variant = Callable[[Inputs], Tensor]


@dataclass
class Problem:
    operation: str
    shape: str
    make: Callable[[torch.device, torch.dtype], Inputs]
    leaves: tuple[str, ...]
    """Inputs that get a gradient."""
    variants: dict[str, Variant]
    flops: float
    elements: float
    """Least numbers to move, in units of the dtype."""
    notes: dict[str, str] = field(default_factory=dict)


def implementations(device: torch.device) -> list[str]:
    """Of homodistil's own operations, those that can run here."""
    return ["torch", "triton"] if device.type == "cuda" else ["torch"]


def problems(device: torch.device, size: str) -> list[Problem]:
    """What a `size` of "quick" or "standard" compares on this device."""
    shapes = _SHAPES[device.type, size]
    made = [_attention(*shape, target, device) for shape in shapes["attention"] for target in _TARGETS]
    made += [_rows(rows, device) for rows in shapes["rows"]]
    made += [_linear(*shape, device) for shape in shapes["linear"]]
    made += [_head(sequences, device) for sequences in shapes["head"]]
    return made + [_hidden(*shape, device, space) for shape in shapes["hidden"] for space in ("raw", "normalised")]


_TARGETS = ["scores", "centred_scores", "probabilities", "probabilities_kl"]
_SHAPES = {
    ("cuda", "quick"): {
        "attention": [(64, 12, 128, 64, 64), (16, 12, 512, 64, 64)],
        "rows": [1229],
        "linear": [(1229, 768, 768)],
        "head": [64],
        "hidden": [(64, 128, 576, 768)],
    },
    ("cuda", "standard"): {
        "attention": [(64, 12, 128, 64, 64), (64, 12, 128, 20, 64), (16, 12, 512, 64, 64), (16, 12, 512, 48, 64)],
        "rows": [1229, 8192],
        "linear": [(1229, 768, 768), (1229, 256, 768), (8192, 576, 768)],
        "head": [64],
        "hidden": [(64, 128, 576, 768), (256, 128, 576, 768)],
    },
    ("cpu", "quick"): {
        "attention": [(4, 12, 128, 64, 64), (1, 12, 512, 28, 64)],
        "rows": [128],
        "linear": [(128, 256, 768)],
        "head": [2],
        "hidden": [(8, 128, 256, 768)],
    },
    ("cpu", "standard"): {
        "attention": [(8, 12, 128, 64, 64), (8, 12, 128, 20, 64), (2, 12, 512, 64, 64), (2, 12, 512, 28, 64)],
        "rows": [154, 1024],
        "linear": [(154, 768, 768), (154, 256, 768), (1024, 256, 768)],
        "head": [8],
        "hidden": [(8, 128, 256, 768), (8, 128, 576, 768)],
    },
}
"""attention: B, heads, T, dims of a student head, of a teacher head. linear: rows, hidden of student, of teacher.
head: sequences. hidden: B, T, hidden of student, of teacher."""


def _randn(*shape: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype)


def _mask(num_rows: int, num_tokens: int, device: torch.device) -> Tensor:
    """A batch of real text: the last quarter of the rows is padded by a third."""
    mask = torch.ones(num_rows, num_tokens, dtype=torch.int64, device=device)
    mask[num_rows - num_rows // 4 :, num_tokens * 2 // 3 :] = 0
    return mask


# -- attention maps


def _attention(b: int, n: int, t: int, hs: int, ht: int, target: str, device: torch.device) -> Problem:
    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        student = {name: _randn(b, n, t, hs, device=device, dtype=dtype) for name in ("qs", "ks")}
        teacher = {name: _randn(b, n, t, ht, device=device, dtype=dtype) for name in ("qt", "kt")}
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
        variants={"eager": lambda x: eager_attention(x, target)} | _own(ours, device),
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


# -- vocabulary


def _rows(m: int, device: torch.device) -> Problem:
    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        student = _randn(m, VOCABULARY, device=device, dtype=dtype, scale=3.0)
        teacher = student + _randn(m, VOCABULARY, device=device, dtype=dtype)
        return {"student": student, "teacher": teacher, "labels": _labels(m, device)}

    def eager(x: Inputs) -> Tensor:
        return eager_cross_entropy_and_kl(x["student"], x["teacher"], x["labels"])

    def ours(implementation: str) -> Variant:
        def run(x: Inputs) -> Tensor:
            ce, kl = masked_lm_losses(x["student"], x["teacher"], x["labels"], TEMPERATURE, implementation)
            return 0.5 * ce + 0.5 * kl

        return run

    return Problem(
        operation="CE + KL of logits",
        shape=f"M{m} V{VOCABULARY}",
        make=make,
        leaves=("student",),
        variants={"eager": eager} | _own(ours, device),
        flops=20.0 * m * VOCABULARY,
        elements=3.0 * m * VOCABULARY,
    )


def _linear(r: int, hs: int, ht: int, device: torch.device) -> Problem:
    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        inputs = {"labels": _labels(r, device), "half": torch.tensor(0.5, device=device)}
        for name, hidden in (("student", hs), ("teacher", ht)):
            inputs[f"{name}_rows"] = _randn(r, hidden, device=device, dtype=dtype)
            inputs[f"{name}_weight"] = _randn(VOCABULARY, hidden, device=device, dtype=dtype, scale=hidden**-0.5)
            inputs[f"{name}_bias"] = _randn(VOCABULARY, device=device, dtype=dtype, scale=0.1)
        return inputs

    def eager(x: Inputs) -> Tensor:
        student = functional.linear(x["student_rows"], x["student_weight"], x["student_bias"])
        teacher = functional.linear(x["teacher_rows"], x["teacher_weight"], x["teacher_bias"])
        return eager_cross_entropy_and_kl(student, teacher, x["labels"])

    def ours(implementation: str) -> Variant:
        def run(x: Inputs) -> Tensor:
            total, _, _ = linear_masked_lm_losses(
                *(x[f"student_{part}"] for part in ("rows", "weight", "bias")),
                *(x[f"teacher_{part}"] for part in ("rows", "weight", "bias")),
                x["labels"],
                x["half"],
                x["half"],
                TEMPERATURE,
                implementation=implementation,
            )
            return total

        return run

    return Problem(
        operation="decoder + CE + KL",
        shape=f"R{r} H{hs}/{ht} V{VOCABULARY}",
        make=make,
        leaves=("student_rows", "student_weight", "student_bias"),
        variants={"eager": eager} | _own(ours, device) | liger_variant(device),
        flops=2.0 * r * VOCABULARY * (3 * hs + ht),
        elements=2.0 * VOCABULARY * hs + VOCABULARY * ht + r * (2 * hs + ht),
        notes={"liger": "fits rows that all carry a label; KL without temperature^2, mended by a factor"},
    )


def eager_cross_entropy_and_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """0.5 CE + 0.5 T^2 KL(teacher || student), sums over rows, softmax in fp32."""
    ce, kl = eager_vocabulary(student, teacher, labels, TEMPERATURE)
    return 0.5 * ce + 0.5 * kl


def eager_vocabulary(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(CE of the labels that are not -100, T^2 KL(teacher || student)), sums over rows, softmax in fp32."""
    student, teacher = student.float(), teacher.float()
    ce = functional.cross_entropy(student, labels, reduction="sum")
    log_q, log_p = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    return ce, temperature**2 * functional.kl_div(log_q, log_p, reduction="sum", log_target=True)


def _head(sequences: int, device: torch.device) -> Problem:
    """The whole MLM head of both models (transform, decoder, losses) with 15 % of the tokens masked: on all rows, of
    which the losses take the masked ones, or on those alone."""
    num_rows, hidden, share = sequences * 128, 768, 0.15
    num_masked = round(share * num_rows)
    shapes = {"dense": (hidden, hidden), "norm": (hidden,), "decoder": (VOCABULARY, hidden)}

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        masked = torch.randperm(num_rows, device=device)[:num_masked].sort().values
        inputs = {"masked": masked, "labels": _labels(num_masked, device)}
        for name in ("student", "teacher"):
            inputs[f"{name}_rows"] = _randn(num_rows, hidden, device=device, dtype=dtype)
            for part, shape in shapes.items():
                inputs[f"{name}_{part}"] = _randn(*shape, device=device, dtype=dtype, scale=hidden**-0.5)
                inputs[f"{name}_{part}_bias"] = _randn(shape[0], device=device, dtype=dtype, scale=0.1)
        return inputs

    def logits(x: Inputs, name: str, index: Tensor | None) -> Tensor:
        rows = x[f"{name}_rows"] if index is None else x[f"{name}_rows"].index_select(0, index)
        rows = functional.gelu(functional.linear(rows, x[f"{name}_dense"], x[f"{name}_dense_bias"]))
        rows = functional.layer_norm(rows, (hidden,), x[f"{name}_norm"], x[f"{name}_norm_bias"])
        return functional.linear(rows, x[f"{name}_decoder"], x[f"{name}_decoder_bias"])

    def variant(all_rows: bool, eager: bool) -> Variant:
        def run(x: Inputs) -> Tensor:
            both = [logits(x, name, None if all_rows else x["masked"]) for name in ("student", "teacher")]
            if all_rows:
                both = [each.index_select(0, x["masked"]) for each in both]
            if eager:
                return eager_cross_entropy_and_kl(*both, x["labels"])
            ce, kl = masked_lm_losses(*both, x["labels"], TEMPERATURE)
            return 0.5 * ce + 0.5 * kl

        return run

    return Problem(
        operation="MLM head and losses",
        shape=f"{num_rows} rows, {num_masked} masked",
        make=make,
        leaves=("student_rows", *(f"student_{part}{end}" for part in shapes for end in ("", "_bias"))),
        variants={
            "eager": variant(all_rows=True, eager=True),
            "all rows": variant(all_rows=True, eager=False),
            "masked rows, eager losses": variant(all_rows=False, eager=True),
            "masked rows": variant(all_rows=False, eager=False),
        },
        flops=2.0 * num_rows * hidden * (hidden + VOCABULARY) * 4,
        elements=hidden * (3 * (hidden + VOCABULARY) + 3 * num_masked),
        notes={"eager": "of the MLM head: all rows, eager losses"},
    )


def liger_variant(device: torch.device) -> dict[str, Variant]:
    """Liger's chunked linear CE + KL where it is installed. beta=0 is KL(teacher || student); means over rows."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        return {}
    # Their term has no T^2: a soft weight of 0.5 T^2 gives the same loss. Compiled as they ship it, but not on a CPU,
    # where it takes up to a minute a shape.
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.5,
        weight_soft_loss=0.5 * TEMPERATURE**2,
        beta=0.0,
        temperature=TEMPERATURE,
        compiled=device.type == "cuda",
    )

    def run(x: Inputs) -> Tensor:
        student, teacher = ((x[f"{name}_rows"], x[f"{name}_weight"]) for name in ("student", "teacher"))
        mean_loss = loss(*student, *teacher, x["labels"], x["student_bias"], x["teacher_bias"])
        return mean_loss * len(x["labels"])

    return {"liger": run}


def _labels(m: int, device: torch.device) -> Tensor:
    return torch.randint(0, VOCABULARY, (m,), device=device)


# -- hidden states


def _hidden(b: int, t: int, ds: int, dt: int, device: torch.device, space: str) -> Problem:
    distance = {"raw": hidden_mse, "normalised": normalised_hidden_mse}[space]

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        inputs = {"student": _randn(b, t, ds, device=device, dtype=dtype), "mask": _mask(b, t, device)}
        inputs["teacher"] = _randn(b, t, dt, device=device, dtype=dtype)
        return inputs | {"weight": _randn(dt, ds, device=device, dtype=dtype, scale=ds**-0.5)}

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


def _own(variant_of: Callable[[str], Variant], device: torch.device) -> dict[str, Variant]:
    return {f"homodistil {name}": variant_of(name) for name in implementations(device)}
