"""FLOP formulas against torch's own counter on a real BERT with odd widths, and the peak of the device."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM

from homodistil.config.schema import LossConfig
from homodistil.distill.cost import step_flops
from homodistil.metrics.device_peak import PeakFlops, datasheet_flops, peak_flops
from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.flops import StepFlops

VOCAB, LAYERS, SEQUENCES, SEQ_LEN, ROWS = 101, 3, 3, 13, 7
NO_DISTILLATION = {"kl": 0.0, "hidden": 0.0, "attention": 0.0, "embedding": 0.0}


def stock_bert(hidden_size: int, ffn: int, heads: int) -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=hidden_size,
            num_hidden_layers=LAYERS,
            num_attention_heads=heads,
            intermediate_size=ffn,
            max_position_embeddings=32,
            # Matrix products by name: a fused kernel's backward recomputes the scores, which are not model FLOPs.
            attn_implementation="eager",
        )
    )


def uneven_bert() -> BertForMaskedLM:
    """Every layer with its own heads, head dims and feed-forward width; heads x dim is not the hidden size."""
    model = stock_bert(hidden_size=21, ffn=40, heads=3)
    for i, layer in enumerate(bert.layers(model)):
        heads, head_dim, ffn = 1 + i, 5 + 2 * i, 31 - 4 * i
        attention = layer.attention.self
        attention.num_attention_heads, attention.attention_head_size = heads, head_dim
        attention.all_head_size = heads * head_dim
        for name in ("query", "key", "value"):
            setattr(attention, name, nn.Linear(21, heads * head_dim))
        layer.attention.output.dense = nn.Linear(heads * head_dim, 21)
        layer.intermediate.dense, layer.output.dense = nn.Linear(21, ffn), nn.Linear(ffn, 21)
    return model


def count(step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def logits_of_rows(model: BertForMaskedLM, rows: int) -> torch.Tensor:
    ids = torch.randint(VOCAB, (SEQUENCES, SEQ_LEN))
    states = bert.backbone(model)(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return bert.lm_head(model)(states.flatten(0, 1)[:rows])


def flops(student: dict, teacher: dict, **loss) -> StepFlops:
    shape = {"num_sequences": SEQUENCES, "seq_len": SEQ_LEN, "target_rows": ROWS, "vocab_size": VOCAB}
    return step_flops(student, teacher, LossConfig(**({"kl": 1.0} | loss)), **shape)


# All comparisons below are exact: both sides count the same matrix products in integers.


@pytest.mark.parametrize("build", [uneven_bert, lambda: stock_bert(24, 56, 4)], ids=["uneven", "stock"])
def test_student_forward_and_backward(build):
    model = build()
    widths = bert.axis_table(model).widths
    measured = count(lambda: logits_of_rows(model, ROWS).sum().backward())
    assert flops(widths, widths, **NO_DISTILLATION) == StepFlops(teacher=0, student=measured, losses=0)


@pytest.mark.parametrize(("positions", "rows"), [("masked", ROWS), ("all", SEQUENCES * SEQ_LEN)])
def test_teacher_runs_forward_only_and_its_head_where_kl_looks(positions, rows):
    teacher, student = stock_bert(24, 56, 4), uneven_bert()
    widths = bert.axis_table(student).widths, bert.axis_table(teacher).widths
    with torch.no_grad():
        measured = count(lambda: logits_of_rows(teacher, rows))
    assert flops(*widths, kl_positions=positions).teacher == measured
    assert flops(*widths, kl_positions=positions).student == count(
        lambda: logits_of_rows(student, rows).sum().backward()
    )


def test_teacher_without_kl_runs_no_head():
    teacher = stock_bert(24, 56, 4)
    widths = bert.axis_table(teacher).widths
    with torch.no_grad():
        measured = count(lambda: logits_of_rows(teacher, 0))
    assert flops(widths, widths, kl=0.0).teacher == measured


def test_relations_and_cosine_of_the_last_layers():
    student, teacher = (bert.axis_table(m).widths for m in (uneven_bert(), stock_bert(24, 56, 4)))
    del student["layer.2.ffn"]  # a student of fewer layers: its last one is layer 1, of 2 heads of 7 dims

    def step():
        for heads, dims, is_student in ((2, 7, True), (4, 6, False)):
            for _ in range(3):
                part = torch.randn(SEQUENCES, SEQ_LEN, heads * dims, requires_grad=is_student)
                scores = part @ part.transpose(1, 2)
                if is_student:
                    scores.sum().backward()
        states = torch.randn(SEQUENCES * SEQ_LEN, student["hidden"], requires_grad=True)
        (states @ torch.randn(student["hidden"], teacher["hidden"], requires_grad=True)).sum().backward()

    loss = NO_DISTILLATION | {"cosine": 1.0, "relations": 1.0}
    assert flops(student, teacher, **loss).losses == count(step)
    assert flops(student, teacher, **loss).teacher > 0 == flops(student, teacher, **NO_DISTILLATION).teacher


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_projections(side, learned):
    student, teacher = (bert.axis_table(m).widths for m in (uneven_bert(), stock_bert(24, 56, 4)))

    def step():
        for _ in range(LAYERS + 1):
            states_s = torch.randn(SEQUENCES * SEQ_LEN, student["hidden"], requires_grad=True)
            states_t = torch.randn(SEQUENCES * SEQ_LEN, teacher["hidden"])
            shape = (student["hidden"], teacher["hidden"])
            weight = torch.randn(shape if side == "student" else shape[::-1], requires_grad=learned)
            difference = states_s @ weight - states_t if side == "student" else states_s - states_t @ weight
            difference.square().sum().backward()

    found = flops(student, teacher, attention=0.0, projection=side, projection_learned=learned)
    assert found.losses == count(step)


def test_attention_term_recomputes_scores():
    student, teacher = (bert.axis_table(m).widths for m in (uneven_bert(), stock_bert(24, 56, 4)))

    def step():
        for i in range(LAYERS):
            heads = student[f"layer.{i}.heads"]
            q_s, k_s = (
                torch.randn(SEQUENCES, heads, SEQ_LEN, student[f"layer.{i}.qk_dim"], requires_grad=True) for _ in "qk"
            )
            q_t, k_t = (torch.randn(SEQUENCES, heads, SEQ_LEN, teacher[f"layer.{i}.qk_dim"]) for _ in "qk")
            (q_s @ k_s.transpose(-1, -2) - q_t @ k_t.transpose(-1, -2)).square().sum().backward()

    assert flops(student, teacher, hidden=0.0, embedding=0.0).losses == count(step)


def test_query_key_and_value_output_dims_count_apart():
    widths = {"hidden": 1, "layer.0.ffn": 1, "layer.0.heads": 3, "layer.0.qk_dim": 5, "layer.0.vo_dim": 7}

    def layer():
        x = torch.randn(SEQUENCES * SEQ_LEN, 1, requires_grad=True)
        q, k, v = (x @ torch.randn(1, 3 * dim, requires_grad=True) for dim in (5, 5, 7))
        q, k, v = (y.view(SEQUENCES, SEQ_LEN, 3, -1).transpose(1, 2) for y in (q, k, v))
        mixed = (q @ k.transpose(-1, -2) @ v).transpose(1, 2).reshape(-1, 21)
        out = mixed @ torch.randn(21, 1, requires_grad=True)
        for _ in range(2):
            out = out @ torch.randn(1, 1, requires_grad=True)
        out.sum().backward()

    assert flops(widths, widths, mlm=0.0, **NO_DISTILLATION).student == count(layer)


def test_narrower_student_costs_less_and_parts_add_up():
    teacher = bert.axis_table(stock_bert(24, 56, 4)).widths
    wide, narrow = flops(teacher, teacher), flops({**teacher, "hidden": 12}, teacher)
    assert narrow.student < wide.student and narrow.losses < wide.losses and narrow.teacher == wide.teacher
    assert wide.total == wide.teacher + wide.student + wide.losses > 0


def test_measured_peak_of_the_cpu_is_reachable_and_quick():
    start = time.perf_counter()
    peak = peak_flops("cpu", torch.float32)
    assert time.perf_counter() - start < 5  # 0.3 s budget, one product over, and a busy machine
    assert isinstance(peak, PeakFlops) and "CPU" in peak.source and "fp32" in peak.source
    left, right = torch.randn(2, 512, 512).unbind()
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        best = max(best, 2 * 512**3 / (time.perf_counter() - start))
    # Same kernel, same threads: the two agree but for what other processes take from the cores meanwhile.
    assert peak.flops_per_s / 10 < best < peak.flops_per_s * 10


@pytest.mark.parametrize(
    ("name", "number_format", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "fp16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA L40S", "fp16", 362),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
    ],
)
def test_datasheet_numbers_are_for_exactly_that_device(name, number_format, tera):
    found = datasheet_flops(name, number_format)
    assert found is None if tera is None else found == pytest.approx(tera * 1e12)
