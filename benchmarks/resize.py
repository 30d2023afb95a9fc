"""Cost of resize events on a live DeepSpeed engine: time against a training step, extra memory, bytes between ranks.

    python benchmarks/resize.py                                  # ZeRO-2, bf16, 2 ranks, 10 M parameters, CPU
    python benchmarks/resize.py --stage 1 --dtype float32 --json out.json

Starts its own ranks (torchrun on this machine), twice: once for time, once for memory. A training step is small on
purpose (2 x 32 tokens a rank): the less a step costs, the harder an event is to hide behind it. Extra memory is the
growth of the process's peak resident set over its level before the event, with an allocator that returns freed memory
at once (glibc on Linux only; it makes everything slower, hence the second run); the unit is one fp32 optimizer state's
partition, parameters x 4 bytes / ranks. Every number is the worst of the ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

LAYERS, HIDDEN, FFN, HEADS, VOCABULARY = 10, 256, 1024, 8, 8000
MICRO_BATCH, TOKENS, STEPS_BETWEEN, WARMUP_STEPS = 2, 32, 4, 3


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=[0, 1, 2], default=2, help="ZeRO stage")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="model precision")
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    return parser.parse_args()


# glibc: hand freed blocks back to the system at once, so that the resident set is what is in use.
STRICT_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def run_ranks(args: argparse.Namespace, environment: dict[str, str]) -> dict:
    """The result of rank 0, measured in fresh processes under `environment`."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={args.ranks}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={port}", __file__]
    command += ["--stage", str(args.stage), "--dtype", args.dtype, "--ranks", str(args.ranks)]
    cpu = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    paths = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        subprocess.run(
            [*command, "--json", str(result)], env=os.environ | cpu | {"PYTHONPATH": paths} | environment, check=True
        )
        return json.loads(result.read_text())


def events(table) -> dict[str, dict[str, Tensor]]:
    """Name -> what stays. Applied one after the other; `table` is the one before the first."""
    generator = torch.Generator().manual_seed(0)

    def pick(size: int, count: int) -> Tensor:
        return torch.randperm(size, generator=generator)[:count].sort().values

    def per_head(heads: int, size: int, count: int) -> Tensor:
        return torch.stack([pick(size, count) for _ in range(heads)])

    layers, dim = [f"layer.{i}" for i in range(LAYERS)], HIDDEN // HEADS
    heads = {f"{layer}.heads": pick(HEADS, HEADS - 1) for layer in layers}
    dims = {f"{layer}.{axis}": per_head(HEADS, dim, dim - 4) for layer in layers for axis in ("qk_dim", "vo_dim")}
    return {
        "ffn of every layer": {f"{layer}.ffn": pick(FFN, FFN - 64) for layer in layers},
        "hidden": {"hidden": pick(HIDDEN, HIDDEN - 16)},
        "a head of every layer, dims of every head": heads | dims,
        "one neuron": {"layer.0.ffn": pick(FFN - 64, FFN - 65)},
        "all axes": {
            "hidden": pick(HIDDEN - 16, HIDDEN - 32),
            **{f"{layer}.ffn": pick(FFN - 65 if layer == "layer.0" else FFN - 64, FFN - 128) for layer in layers},
            **{f"{k}": per_head(HEADS - 1, dim - 4, dim - 6) for k in dims},
        },
    }


def make_engine(stage: int, dtype: str):
    import deepspeed
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )
    model = BertForMaskedLM(config)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    ds_config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": stage},
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)[0]


def train_step(engine) -> float:
    """Milliseconds of one optimizer step on random tokens."""
    ids = torch.randint(0, VOCABULARY, (MICRO_BATCH, TOKENS))
    start = time.perf_counter()
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    return (time.perf_counter() - start) * 1e3


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def run_event(engine, keep: dict[str, Tensor]) -> dict:
    import torch.distributed as dist

    from homodistil.models import bert
    from homodistil.resize import make_plan, resize

    model = engine.module
    plan = make_plan(bert.axis_table(model), keep)
    state_bytes = sum(p.numel() for p in model.parameters()) * 4 / dist.get_world_size()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = resident_bytes("VmRSS")
    cost = resize(engine, plan)
    extra = resident_bytes("VmHWM") - before
    bert.refresh(model, plan.widths_after)
    slowest = torch.tensor([cost.milliseconds, extra / state_bytes, extra / 2**20])
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    milliseconds, extra_states, extra_mib = slowest.tolist()
    return {
        "milliseconds": milliseconds,
        "extra_memory_mib": extra_mib,
        "extra_memory_states": extra_states,
        "bytes_moved": cost.bytes_moved,
        "parameters_after": sum(p.numel() for p in model.parameters()),
    }


def measure(args: argparse.Namespace) -> dict:
    import deepspeed

    from homodistil.models import bert
    from homodistil.resize import check_supported

    torch.set_num_threads(1)
    deepspeed.init_distributed()
    engine = make_engine(args.stage, args.dtype)
    check_supported(engine)
    parameters = sum(p.numel() for p in engine.module.parameters())
    for _ in range(WARMUP_STEPS):
        train_step(engine)
    steps, rows = [train_step(engine) for _ in range(STEPS_BETWEEN)], {}
    for name, keep in events(bert.axis_table(engine.module)).items():
        rows[name] = run_event(engine, keep)
        steps += [train_step(engine) for _ in range(STEPS_BETWEEN)]
    versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "python": platform.python_version()}
    return {
        "stage": args.stage,
        "dtype": args.dtype,
        "ranks": args.ranks,
        "wrapper": type(engine.optimizer).__name__,
        "parameters": parameters,
        "step_milliseconds": statistics.median(steps),
        "events": rows,
        "versions": versions,
    }


def table(result: dict) -> str:
    step = result["step_milliseconds"]
    lines = [
        f"ZeRO-{result['stage']} {result['dtype']}, {result['ranks']} ranks, {result['wrapper']}, "
        f"{result['parameters'] / 1e6:.2f} M parameters, median step {step:.0f} ms",
        "",
        "| event | ms | of a step | extra MiB | of one fp32 state partition | MiB between ranks | parameters after |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in result["events"].items():
        lines.append(
            f"| {name} | {row['milliseconds']:.0f} | {row['milliseconds'] / step:.2f} | {row['extra_memory_mib']:.1f} "
            f"| {row['extra_memory_states']:.2f} | {row['bytes_moved'] / 2**20:.1f} "
            f"| {row['parameters_after'] / 1e6:.2f} M |"
        )
    return "\n".join(lines)


def run_worker(args: argparse.Namespace) -> None:
    import torch.distributed as dist

    result = measure(args)
    if dist.get_rank() == 0:
        args.json.write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    args = parse_args()
    if "LOCAL_RANK" in os.environ:
        run_worker(args)
        return
    result, memory = run_ranks(args, {}), run_ranks(args, STRICT_ALLOCATOR)
    for name, row in result["events"].items():
        row |= {key: memory["events"][name][key] for key in ("extra_memory_mib", "extra_memory_states")}
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
