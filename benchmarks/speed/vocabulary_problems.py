"""Operations over the vocabulary: cross-entropy with KL of logits, with the decoder, and with the whole MLM head."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.speed.kernel_problem import Inputs, Problem, Variant, homodistil_variants, randn
from homodistil.kernels.masked_lm import linear_masked_lm_losses, masked_lm_losses

VOCABULARY = 30522
TEMPERATURE = 2.0


def logits_problem(m: int, device: torch.device) -> Problem:
    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        student = randn(m, VOCABULARY, device=device, dtype=dtype, scale=3.0)
        teacher = student + randn(m, VOCABULARY, device=device, dtype=dtype)
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
        variants={"eager": eager} | homodistil_variants(ours, device),
        flops=20.0 * m * VOCABULARY,
        elements=3.0 * m * VOCABULARY,
    )


def decoder_problem(r: int, hs: int, ht: int, device: torch.device) -> Problem:
    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        inputs = {"labels": _labels(r, device), "half": torch.tensor(0.5, device=device)}
        for name, hidden in (("student", hs), ("teacher", ht)):
            inputs[f"{name}_rows"] = randn(r, hidden, device=device, dtype=dtype)
            inputs[f"{name}_weight"] = randn(VOCABULARY, hidden, device=device, dtype=dtype, scale=hidden**-0.5)
            inputs[f"{name}_bias"] = randn(VOCABULARY, device=device, dtype=dtype, scale=0.1)
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
        variants={"eager": eager} | homodistil_variants(ours, device) | liger_variant(device),
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


def mlm_head_problem(sequences: int, device: torch.device) -> Problem:
    """The whole MLM head of both models (transform, decoder, losses) with 15 % of the tokens masked: on all rows, of
    which the losses take the masked ones, or on those alone."""
    num_rows, hidden, share = sequences * 128, 768, 0.15
    num_masked = round(share * num_rows)
    shapes = {"dense": (hidden, hidden), "norm": (hidden,), "decoder": (VOCABULARY, hidden)}

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        masked = torch.randperm(num_rows, device=device)[:num_masked].sort().values
        inputs = {"masked": masked, "labels": _labels(num_masked, device)}
        for name in ("student", "teacher"):
            inputs[f"{name}_rows"] = randn(num_rows, hidden, device=device, dtype=dtype)
            for part, shape in shapes.items():
                inputs[f"{name}_{part}"] = randn(*shape, device=device, dtype=dtype, scale=hidden**-0.5)
                inputs[f"{name}_{part}_bias"] = randn(shape[0], device=device, dtype=dtype, scale=0.1)
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
