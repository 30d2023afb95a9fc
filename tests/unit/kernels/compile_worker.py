"""Compiles what the product would launch on some architectures, without a GPU; run by test_compile_ahead.py.

    python tests/unit/kernels/compile_worker.py 80 90 [--full] [--spilling]

Triton gets a driver that names an architecture and owns no device, and every launch ends where compilation does. The
cases then call the product's own launch functions on CPU tensors: block sizes, warps, stages and specialisations are
those that the product chooses itself, and none is written down here. Each architecture has a process of its own, forked
after the imports. Prints one line `KERNEL {json}` a binary.

Not under TRITON_INTERPRET, which turns kernels into Python where they are defined.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import sys
import time

import torch
import triton
import triton.language as tl

os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"  # ptxas -v: registers and spills

from compile_cases import CASES
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from homodistil.kernels import attention_map_triton, triton_support


class CompileOnly:
    """What Triton asks of a driver until a kernel is to run."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Launches:
    """Every launch from now on compiles and reports its binary; nothing runs."""

    def __init__(self, capability: int) -> None:
        driver.set_active(CompileOnly(capability))
        self.case, self.capability, self.reported = "", capability, set()
        run = JITFunction.run

        def compile_alone(function: JITFunction, *args, grid, warmup, **options):
            log, start = io.StringIO(), time.perf_counter()
            with contextlib.redirect_stdout(log):
                kernel = run(function, *args, grid=grid, warmup=True, **options)
            if kernel.hash not in self.reported:
                self.reported.add(kernel.hash)
                self.report(function, kernel, log.getvalue(), time.perf_counter() - start)
            return kernel

        JITFunction.run = compile_alone

    def report(self, function: JITFunction, kernel, log: str, seconds: float) -> None:
        found = {
            "case": self.case,
            "kernel": f"{function.__module__.rsplit('.', 1)[-1]}.{function.__name__}",
            "capability": self.capability,
            "warps": kernel.metadata.num_warps,
            "stages": kernel.metadata.num_stages,
            "registers": number("Used {} registers", log),
            "stack_bytes": number("{} bytes stack frame", log),
            "spill_bytes": number("{} bytes spill stores", log) + number("{} bytes spill loads", log),
            "shared_bytes": kernel.metadata.shared,
            "cubin_bytes": len(kernel.asm["cubin"]),
            "seconds": round(seconds, 2),
        }
        print("KERNEL", json.dumps(found), flush=True)


@triton.jit
def spilling_kernel(source, target, SIZE: tl.constexpr):
    """Holds SIZE numbers in the registers of one warp."""
    values = tl.load(source + tl.arange(0, SIZE))
    tl.store(target + tl.arange(0, SIZE), tl.exp(values - tl.max(values, 0)) * tl.sum(values, 0) + values)


def number(text: str, log: str) -> int:
    """The largest number at {} in any line of ptxas's report. AssertionError when it says nothing of the kind."""
    found = re.findall(text.format(r"(\d+)"), log)
    assert found, f"ptxas said nothing about {text!r}:\n{log}"
    return max(map(int, found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capabilities", type=int, nargs="+", help="80, 90")
    parser.add_argument("--full", action="store_true", help="the whole matrix")
    parser.add_argument("--spilling", action="store_true", help="also a kernel that spills, to see that it shows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = multiprocessing.get_context("fork").Process
    workers = [start(target=compile_cases_for, args=(capability, args)) for capability in args.capabilities]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(any(worker.exitcode for worker in workers))


def compile_cases_for(capability: int, args: argparse.Namespace) -> None:
    triton_support.triton_available = lambda device: True  # tensors are on the CPU, and nothing will touch them
    attention_map_triton._capability = lambda device: capability
    launches = Launches(capability)
    for case in CASES:
        if args.full or case.is_representative:
            launches.case = case.name
            case.launch()
    if args.spilling:
        launches.case, values = "spilling", torch.zeros(2**13)
        spilling_kernel[(1,)](values, values, SIZE=2**13, num_warps=1)


if __name__ == "__main__":
    main()
