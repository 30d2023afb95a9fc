"""Each fused operation against the same formula in eager torch and against the best library: time and memory.

    python -m benchmarks.speed.kernels                        # the device there is: GPU if any, CPU otherwise
    python -m benchmarks.speed.kernels --quick                # under 90 s
    python -m benchmarks.speed.kernels --json out.json

All variants of a problem get the same tensors; first their losses and gradients are compared. Then they run by turns
(A B C A B C): the forward alone (with its graph), and forward with backward. On a GPU: CUDA events, warm-up, the L2
cache overwritten before every run, at least 20 runs; medians. Peak memory: what one forward with backward needs beyond
its inputs, by the allocator on a GPU, by the process's resident set on a CPU (glibc, with memory given back at once).

GB/s and TFLOP/s are the least bytes and the eager formula's FLOPs over the time of forward with backward, so that they
order as times do; beside them stand what a large copy and the datasheet (or a large product) give on this device.
liger-kernel joins where it is installed (`pip install liger-kernel`) and computes the same thing.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.harness.environment import environment
from benchmarks.harness.rows import Rows
from benchmarks.harness.run import page, parser, publish
from benchmarks.harness.table import table
from benchmarks.harness.timing import copy_bytes_per_s, interleaved_ms, peak_bytes, strict_allocator
from benchmarks.speed.kernel_problem import Inputs, Problem
from benchmarks.speed.kernel_problems import problems
from homodistil.metrics.device_peak import peak_flops

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BUDGET_S = {"quick": 1.0, "standard": 3.0}
"""A problem and pass: forward, and forward with backward."""
LARGEST_DIFFERENCE = {"bf16": 0.05, "fp16": 0.02, "fp32": 1e-4}
"""Of losses and gradients (norm of the difference over the norm) to eager: its own rounding of maps and logits."""


def parse_args() -> argparse.Namespace:
    made = parser(__doc__, quick="one or two shapes per operation")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    made.add_argument("--only", default="", help="operations whose name contains this")
    return made.parse_args()


def measure_times(problem: Problem, inputs: Inputs, device: torch.device, budget_s: float) -> dict[str, dict]:
    """Variant -> {"forward": [ms], "forward and backward": [ms]}."""
    passes = {
        "forward": {name: lambda f=f: f(inputs) for name, f in problem.variants.items()},
        "forward and backward": {name: lambda f=f: step(f, problem, inputs) for name, f in problem.variants.items()},
    }
    times: dict[str, dict] = {name: {} for name in problem.variants}
    for what, runs in passes.items():
        for name, values in interleaved_ms(runs, device, budget_s).items():
            times[name][what] = values
    return times


def step(variant, problem: Problem, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    loss = variant(inputs)
    return loss.detach(), *torch.autograd.grad(loss, [inputs[name] for name in problem.leaves])


def make_inputs(problem: Problem, device: torch.device, dtype: torch.dtype) -> Inputs:
    torch.manual_seed(0)
    inputs = problem.make(device, dtype)
    for name in problem.leaves:
        inputs[name].requires_grad_()
    return inputs


def differences(problem: Problem, inputs: Inputs) -> dict[str, float]:
    """Variant -> largest relative difference to eager, over the loss and every gradient."""
    outputs = {name: [part.double() for part in step(f, problem, inputs)] for name, f in problem.variants.items()}
    expected = outputs.pop("eager")
    return {
        name: max(float((a - b).norm() / b.norm()) for a, b in zip(parts, expected, strict=True))
        for name, parts in outputs.items()
    }


def measure(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[dict]:
    """One entry a problem and variant. Memory last, because a strict allocator slows everything down."""
    size = "quick" if args.quick else "standard"
    chosen = [problem for problem in problems(device, size) if args.only in problem.operation]
    entries = []
    for problem in chosen:
        inputs = make_inputs(problem, device, dtype)
        for name, difference in differences(problem, inputs).items():
            largest = LARGEST_DIFFERENCE[args.dtype]
            assert difference < largest, f"{problem.operation} {problem.shape}: {name} is {difference:.1%} off eager"
        for name, times in measure_times(problem, inputs, device, BUDGET_S[size]).items():
            entries.append({"problem": problem, "variant": name, **times})
        print(f"timed {problem.operation} {problem.shape}", flush=True)
    if device.type == "cpu":
        strict_allocator()
    for problem in chosen:
        inputs = make_inputs(problem, device, dtype)
        for entry in entries:
            if entry["problem"] is problem:
                variant = problem.variants[entry["variant"]]
                entry["peak_bytes"] = peak_bytes(lambda f=variant, x=inputs, p=problem: step(f, p, x), device)
    return entries


def rates(entry: dict, bytes_per_element: int) -> tuple[float, float]:
    """GB/s and TFLOP/s of forward with backward."""
    seconds = statistics.median(entry["forward and backward"]) / 1e3
    problem = entry["problem"]
    return problem.elements * bytes_per_element / seconds / 1e9, problem.flops / seconds / 1e12


COLUMNS = ["operation", "shape", "variant", "forward ms {:.3g}", "with backward ms {:.3g}", "eager / this {:.2f}"]
COLUMNS += ["peak MiB {:.1f}", "GB/s {:.3g}", "TFLOP/s {:.3g}"]


def line(entry: dict, entries: list[dict], bytes_per_element: int) -> list:
    problem = entry["problem"]
    forward, both = (statistics.median(entry[what]) for what in ("forward", "forward and backward"))
    eager = next(e for e in entries if e["problem"] is problem and e["variant"] == "eager")
    times = statistics.median(eager["forward and backward"]) / both
    cells = [problem.operation, problem.shape, entry["variant"], forward, both, times, entry["peak_bytes"] / 2**20]
    return [*cells, *rates(entry, bytes_per_element)]


def rows_of(entries: list[dict], config: dict, bytes_per_element: int) -> list[dict]:
    made = []
    for entry in entries:
        problem, (bandwidth, speed) = entry["problem"], rates(entry, bytes_per_element)
        rows = Rows(problem.operation, config)
        for metric, unit, values in (
            ("forward", "ms", entry["forward"]),
            ("forward and backward", "ms", entry["forward and backward"]),
            ("peak memory", "bytes", entry["peak_bytes"]),
            ("bandwidth", "GB/s", bandwidth),
            ("speed", "TFLOP/s", speed),
        ):
            rows.add(entry["variant"], metric, unit, problem.shape, values)
        made += rows
    return made


def main() -> None:
    args = parse_args()
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    entries = measure(args, device, dtype)
    copied, peak = copy_bytes_per_s(device), peak_flops(device, dtype)
    config = {"device": args.device, "dtype": args.dtype, "quick": args.quick, "threads": torch.get_num_threads()}
    config |= {"copy_gb_per_s": copied / 1e9, "peak_tflops": peak.flops_per_s / 1e12, **environment()}
    notes = {f"{name}: {note}" for e in entries for name, note in e["problem"].notes.items() if name == e["variant"]}
    how = (
        f"A large copy moves {copied / 1e9:,.0f} GB/s here; products reach at most {peak.flops_per_s / 1e12:,.2f} "
        f"TFLOP/s ({peak.source}). How numbers are taken: head of `benchmarks/speed/kernels.py`."
    )
    made = table(COLUMNS, [line(entry, entries, dtype.itemsize) for entry in entries])
    text = page(f"Fused operations, {args.dtype} on {args.device}", how, made, *sorted(notes))
    publish("kernels", text, rows_of(entries, config, dtype.itemsize), args)


if __name__ == "__main__":
    main()
