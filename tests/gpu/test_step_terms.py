"""A student's loss terms and gradients on the GPU, in every runtime of the teacher and with our kernels, equal plain
torch on the CPU: the parts of a training step together, in fp32.
"""

from __future__ import annotations

import pytest
import torch
from support.small import small_batch, small_model
from torch import Tensor

from homodistil.config.schema import LossConfig, TeacherConfig
from homodistil.data.batch import Batch
from homodistil.distill.build_teacher import build_teacher
from homodistil.distill.student import Student
from homodistil.kernels.triton_support import triton_installed

CPU = torch.device("cpu")
SIZE = {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 64, "num_hidden_layers": 2}
CLOSE = {"rtol": 2e-4, "atol": 2e-6}
"""fp32 sums in another order, through two layers; gradients are about 0.01 (TF32 is off)."""
RUNTIMES = {
    "as a whole": {"lock_step": False},
    "lock-step": {},
    "compile": {"runtime": "compile"},
    "deepspeed": {"runtime": "deepspeed"},
}
ON_A_GPU = {"own stream": {"own_stream": True}, "compile, own stream": {"runtime": "compile", "own_stream": True}}
LOSSES = [
    {"attention_target": "scores"},
    {"attention_target": "probabilities", "kl_positions": "all", "kl_temperature": 2.0},
    {"attention_target": "probabilities_kl", "projection": "teacher"},
    {"attention_target": "centred_scores", "hidden_space": "normalised"},
    {"attention_target": "centred_scores", "hidden_space": "normalised", "projection": "teacher"},
]

pytestmark = pytest.mark.gpu


def on(batch: Batch, device: torch.device) -> Batch:
    counts = type(batch.counts)(*(count if count is None else count.to(device) for count in batch.counts))
    return batch.to(device)._replace(counts=counts)


def terms_and_gradients(device: torch.device, teacher: dict, loss: dict) -> dict[str, Tensor]:
    """Of two different models on one batch. Three steps: what is kept between calls is used a second time."""
    student = Student(small_model(seed=1, **SIZE), LossConfig(**({"kl": 1.0} | loss))).to(device)
    teacher = build_teacher(small_model(**SIZE).to(device), TeacherConfig(**teacher), device, torch.float32)
    for seed in range(3):
        batch = on(small_batch(seed), device)
        student.zero_grad()
        terms = student(batch, teacher(batch))
        terms.total.backward()
    found = {f"gradient of {name}": p.grad for name, p in student.named_parameters() if p.grad is not None}
    return {name: value.detach().cpu() for name, value in (terms.terms | found).items()}


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Tensor]]:
    """Plain torch on the CPU, one entry of LOSSES each."""
    return [terms_and_gradients(CPU, {"lock_step": False}, loss | {"kernels": "torch"}) for loss in LOSSES]


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and len(wanted) > 20
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("i", range(len(LOSSES)), ids=[str(loss) for loss in LOSSES])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_kernels(device, expected, i, kernels):
    assert_same(terms_and_gradients(device, {}, LOSSES[i] | {"kernels": kernels}), expected[i])


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_runtimes(device, expected, runtime):
    assert_same(terms_and_gradients(device, RUNTIMES[runtime], LOSSES[0]), expected[0])


@pytest.mark.parametrize("runtime", ON_A_GPU)
def test_runtimes_beside_the_student(gpu, expected, runtime):
    assert_same(terms_and_gradients(gpu, ON_A_GPU[runtime], LOSSES[0]), expected[0])


@pytest.mark.skipif(not triton_installed(), reason="triton is not installed")
def test_auto_is_triton_on_a_gpu(gpu, monkeypatch):
    from homodistil.kernels import attention_map_triton, masked_lm_triton

    calls = set()

    def watched(module, name: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.add(name) or function(*args, **kwargs))

    watched(attention_map_triton, "evaluate")
    watched(masked_lm_triton, "losses")
    terms_and_gradients(gpu, {}, LOSSES[0] | {"kernels": "auto"})
    assert calls == {"evaluate", "losses"}
