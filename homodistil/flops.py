"""Model FLOPs of one optimizer step from shapes alone, and the peak of the device: together they give the MFU.

A multiply-add is 2 FLOPs. Counted: every matrix product the mathematics asks for. Not counted: embedding look-ups,
LayerNorm, softmax, GELU, the optimizer, and anything a kernel recomputes to save memory. Attention products are
counted over the full (seq_len, seq_len) square, padding included.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch

from homodistil.config import LossConfig
from homodistil.models.axes import Widths


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one optimizer step over the whole global batch (all ranks together)."""

    teacher: float
    """Forward of the frozen teacher."""
    student: float
    """Forward and backward of the student."""
    losses: float
    """Distillation projections, and the scores that the attention and relation terms recompute, with their backward."""

    @property
    def total(self) -> float:
        return self.teacher + self.student + self.losses


def step_flops(
    student: Widths,
    teacher: Widths,
    loss: LossConfig,
    *,
    num_sequences: int,
    seq_len: int,
    masked_rows: float,
    vocab_size: int,
) -> StepFlops:
    """FLOPs of one optimizer step at the student's widths of today.

    Args:
        student, teacher: axis -> width (`models.axes`); the student may have fewer layers.
        loss: a term of weight 0 costs nothing; without any distillation term the teacher does not run.
        num_sequences: global batch size in sequences.
        seq_len: tokens of a sequence, padding included.
        masked_rows: rows on which the MLM head runs, over the whole global batch (`kl_positions: all`: every token).
        vocab_size: rows of the decoder.
    """
    tokens = num_sequences * seq_len
    kl_rows = tokens if loss.kl_positions == "all" else masked_rows
    student_rows = max(masked_rows if loss.mlm else 0, kl_rows if loss.kl else 0)
    forward = _backbone(student, tokens, seq_len) + _mlm_head(student["hidden"], student_rows, vocab_size)
    distils = any((loss.kl, loss.hidden, loss.attention, loss.embedding, loss.cosine, loss.relations))
    teacher_head = _mlm_head(teacher["hidden"], kl_rows if loss.kl else 0, vocab_size)
    return StepFlops(
        teacher=_backbone(teacher, tokens, seq_len) + teacher_head if distils else 0,
        student=3 * forward,  # backward: one product for the gradient of each of the two factors
        losses=_projections(student, teacher, loss, tokens)
        + _score_terms(student, teacher, loss, tokens, seq_len)
        + _relation_terms(student, teacher, loss, tokens, seq_len),
    )


def num_layers(widths: Widths) -> int:
    return sum(axis.endswith(".ffn") for axis in widths)


def _backbone(widths: Widths, tokens: float, seq_len: int) -> float:
    return sum(_layer(widths, i, tokens, seq_len) for i in range(num_layers(widths)))


def _layer(widths: Widths, i: int, tokens: float, seq_len: int) -> float:
    hidden, ffn, heads = widths["hidden"], widths[f"layer.{i}.ffn"], widths[f"layer.{i}.heads"]
    qk, vo = heads * widths[f"layer.{i}.qk_dim"], heads * widths[f"layer.{i}.vo_dim"]
    weights = hidden * (2 * qk + 2 * vo + 2 * ffn)  # query, key; value, output; the two of the feed-forward block
    products = seq_len * (qk + vo)  # scores; weighted sum
    return 2 * tokens * (weights + products)


def _mlm_head(hidden: int, rows: float, vocab_size: int) -> float:
    return 2 * rows * hidden * (hidden + vocab_size)  # transform, decoder


def _projections(student: Widths, teacher: Widths, loss: LossConfig, tokens: float) -> float:
    """H_s W or H_t W once for the embedding and once a layer, forward and backward."""
    count = (1 if loss.embedding else 0) + (num_layers(student) if loss.hidden else 0)
    forward = 2 * tokens * student["hidden"] * teacher["hidden"]
    # The teacher's states need no gradient; a frozen W needs none either.
    passes = 1 + (loss.projection == "student") + loss.projection_learned
    # The cosine's W is always the student's; of equal widths it may not even be there.
    of_cosine = 2 + loss.projection_learned if loss.cosine and student["hidden"] != teacher["hidden"] else 0
    return (count * passes + of_cosine) * forward


def _score_terms(student: Widths, teacher: Widths, loss: LossConfig, tokens: float, seq_len: int) -> float:
    """q.k of the student (forward and backward) and of the teacher's heads that the student still has."""
    if not loss.attention:
        return 0
    total = 0
    for i in range(num_layers(student)):
        heads = student[f"layer.{i}.heads"]
        per_head = 3 * student[f"layer.{i}.qk_dim"] + teacher[f"layer.{i}.qk_dim"]
        total += 2 * tokens * seq_len * heads * per_head
    return total


def _relation_terms(student: Widths, teacher: Widths, loss: LossConfig, tokens: float, seq_len: int) -> float:
    """A A^T of queries, keys and values of one layer: of the student (forward and backward) and of the teacher."""
    if not loss.relations:
        return 0
    ours, theirs = (dims_of_last_layer(widths) for widths in (student, teacher))
    return 2 * tokens * seq_len * (3 * ours + theirs)


def dims_of_last_layer(widths: Widths) -> int:
    """Of all heads, queries, keys and values together."""
    layer = f"layer.{num_layers(widths) - 1}"
    return widths[f"{layer}.heads"] * (2 * widths[f"{layer}.qk_dim"] + widths[f"{layer}.vo_dim"])


@dataclass(frozen=True)
class PeakFlops:
    """What one rank's device can do at most, and where the number comes from (shown beside every MFU)."""

    flops_per_s: float
    source: str


# Dense FLOP/s of tensor cores with fp32 accumulation, from NVIDIA's datasheets (their headline numbers with
# sparsity halved where only those are printed). Full names: a laptop or MIG variant must not pass for the real thing.
_T = 1e12
_SXM_HOPPER = {"half": 989.4 * _T, "tf32": 494.7 * _T, "fp32": 66.9 * _T}
_NVL_HOPPER = {"half": 835.5 * _T, "tf32": 417.5 * _T, "fp32": 60 * _T}
_DATASHEET = {
    r"A100[- ](SXM4|PCIE|PCIe).*|A100 80GB PCIe": {"half": 312 * _T, "tf32": 156 * _T, "fp32": 19.5 * _T},
    r"H100( 80GB HBM3| SXM5.*)": _SXM_HOPPER,
    r"H100 PCIe": {"half": 756 * _T, "tf32": 378 * _T, "fp32": 51 * _T},
    r"H100 NVL": _NVL_HOPPER,
    r"H200": _SXM_HOPPER,
    r"H200 NVL": _NVL_HOPPER,
    r"L40S": {"half": 362 * _T, "tf32": 183 * _T, "fp32": 91.6 * _T},
    r"A10": {"half": 125 * _T, "tf32": 62.5 * _T, "fp32": 31.2 * _T},
    r"V100-SXM2.*": {"fp16": 125 * _T, "fp32": 15.7 * _T},
    r"V100-PCI[Ee].*": {"fp16": 112 * _T, "fp32": 14 * _T},
    r"GeForce RTX 4090": {"half": 165.2 * _T, "tf32": 82.6 * _T, "fp32": 82.6 * _T},
}


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> PeakFlops:
    """Peak of one device for matrix products in `dtype`.

    GPU known by name: the datasheet's dense number. Anything else: the best of a few large products, run here with
    this rank's threads (under half a second), so that the MFU of a CPU says how far the step is from plain GEMM.
    """
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = datasheet_flops(name, _format_name(dtype))
        if known is not None:
            return PeakFlops(known, f"datasheet, {name}, {_format_name(dtype)} dense")
        return PeakFlops(_measured(device, dtype), f"measured GEMM, {name}, {_short(dtype)}")
    threads = torch.get_num_threads()
    plural = "s" if threads > 1 else ""
    return PeakFlops(_measured(device, dtype), f"measured GEMM, CPU, {_short(dtype)}, {threads} thread{plural}")


def datasheet_flops(device_name: str, number_format: str) -> float | None:
    """Dense FLOP/s of the GPU called `device_name` by the driver, or None when it or the format is not listed.

    Args:
        number_format: "bf16", "fp16", "tf32" or "fp32".
    """
    name = re.sub(r"^(NVIDIA|Tesla) ", "", device_name)
    if "MIG" in name:
        return None
    for pattern, numbers in _DATASHEET.items():
        if re.fullmatch(pattern, name):
            both_halves = numbers.get("half") if number_format in ("bf16", "fp16") else None
            return numbers.get(number_format, both_halves)
    return None


def _format_name(dtype: torch.dtype) -> str:
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else _short(dtype)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, str(dtype))


def _measured(device: torch.device, dtype: torch.dtype, budget_s: float = 0.3) -> float:
    """Best FLOP/s of square products, the size doubled until one product takes a fiftieth of the budget."""
    # Random values (constant ones draw less power and clock higher), from a generator of their own.
    generator = torch.Generator(device).manual_seed(0)
    size, best, start = 256, 0.0, time.perf_counter()
    spent = seconds = 0.0
    while spent < budget_s:
        if seconds < budget_s / 50 and size < 8192:
            size *= 2
            left, right = (_random_square(size, dtype, generator) for _ in range(2))
            _time_product(left, right)  # warm-up: thread pool, kernel choice, page faults
        seconds = _time_product(left, right)
        best = max(best, 2 * size**3 / seconds)
        spent = time.perf_counter() - start
    return best


def _random_square(size: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(size, size, generator=generator, device=generator.device).to(dtype)


def _time_product(left: torch.Tensor, right: torch.Tensor) -> float:
    _wait(left.device)
    start = time.perf_counter()
    torch.mm(left, right)
    _wait(left.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
