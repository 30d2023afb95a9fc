"""Settings that resizing does not allow, refused from DeepSpeed's JSON alone: one line with field and finding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from homodistil.errors import UserError
from homodistil.resize import check_config

CONFIGS = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))
BF16 = {"bf16": {"enabled": True}}


def _zero(stage: int = 2, **settings) -> dict:
    return {"zero_optimization": {"stage": stage, **settings}}


REFUSED = {
    "unknown stage": (_zero(4), "zero_optimization.stage: found 4"),
    "NVMe": (_zero(offload_optimizer={"device": "nvme"}), "offload_optimizer.device: found 'nvme'"),
    "partial offload": (_zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), "offload_optimizer.ratio: found 0.5"),
    "SuperOffload": (_zero(offload_optimizer={"device": "cpu", "super_offload": True}), "super_offload: found true"),
    "offload without ZeRO": (_zero(0, offload_optimizer={"device": "cpu"}), "'cpu' at stage 0"),
    "parameter offload": (_zero(3, offload_param={"device": "cpu"}), "offload_param.device: found 'cpu'"),
    "old offload": (_zero(cpu_offload=True), "zero_optimization.cpu_offload: found true"),
    "ZenFlow": (_zero(zenflow={"topk_ratio": 0.1}), "zero_optimization.zenflow: found a section"),
    "hpZ": (_zero(3, zero_hpz_partition_size=2), "zero_hpz_partition_size: found 2"),
    "quantised weights": (_zero(3, zero_quantized_weights=True), "zero_quantized_weights: found true"),
    "quantised frozen weights": (
        _zero(3, zero_quantized_nontrainable_weights=True),
        "zero_quantized_nontrainable_weights: found true",
    ),
    "quantised gradients": (_zero(3, zero_quantized_gradients=True), "zero_quantized_gradients: found true"),
    "MiCS": (_zero(3, mics_shard_size=2), "mics_shard_size: found 2"),
    "bf16 masters": ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "found true"),
    "bf16 states": ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "bf16_optimizer_states: found true"),
    "fp16 masters": ({"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, "found true"),
    "autocast": ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled: found true"),
    "amp": ({"amp": {"enabled": True}}, "amp.enabled: found true"),
    "DeepCompile": ({"compile": {"deepcompile": True}}, "compile.deepcompile: found true"),
    "tensor parallel": ({"tensor_parallel": {"autotp_size": 4}}, "tensor_parallel.autotp_size: found 4"),
    "sequence parallel": ({"sequence_parallel_size": 2}, "sequence_parallel_size: found 2"),
    "experts": ({"expert_parallel": {"enabled": True}}, "expert_parallel.enabled: found true"),
    "pipeline": ({"pipeline": {"stages": 2}}, "pipeline: found a section"),
    "unmanaged": ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation: found false"),
    "sparse gradients": ({"sparse_gradients": True}, "sparse_gradients: found true"),
    "Muon": ({"optimizer": {"type": "Muon"}}, "optimizer.type: found 'Muon'"),
    "bf16 sums of fp32": ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype: found 'bf16'"),
    "fp32 sums at stage 0": (BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}, "grad_accum_dtype: found 'fp32'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    config, expected = REFUSED[name]
    with pytest.raises(UserError) as refusal:
        check_config(config)
    message = str(refusal.value)
    assert expected in message and "; resizing allows " in message and "\n" not in message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_allowed(path):
    check_config(json.loads(path.read_text()))


def test_memory_pinned_by_deepspeed_itself_is_refused(monkeypatch):
    config = _zero(offload_optimizer={"device": "cpu", "pin_memory": True})
    check_config(config)
    monkeypatch.setenv("DS_PIN_MEMORY_BACKEND", "native")
    with pytest.raises(UserError, match="pin_memory: found true with DS_PIN_MEMORY_BACKEND=native"):
        check_config(config)
    check_config(_zero(offload_optimizer={"device": "cpu", "pin_memory": False}))
