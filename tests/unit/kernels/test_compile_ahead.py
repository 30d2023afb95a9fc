"""Every kernel, as the product would launch it, compiles for both architectures without a GPU, and without spills.

In fp32 a few bytes may spill. A100 is sm_80 (`make test-full`), H100 and H200 are sm_90. What is compiled:
compile_cases.py; how: compile_worker.py, a child process with a compilation cache that lives as long as the test.
`python -m pytest -s` shows the table.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from homodistil.kernels.triton_support import triton_installed

ROOT = Path(__file__).resolve().parents[3]
WORKER = Path(__file__).with_name("compile_worker.py")
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory that one program may have (CUDA C++ Programming Guide, technical specifications per capability)."""
MOST_REGISTERS = 255
"""Of a thread."""
FP32_SPILL_BYTES = 64
"""Of a thread, stores and loads: ptxas spills two to five numbers of some fp32 maps so that another program fits. More
stages, warps or smaller tiles move such spills to other shapes; one stage ends them and takes twice the registers."""
REGISTERS = 65536
"""Of a multiprocessor: a program whose threads want more cannot be launched at all."""

pytestmark = [pytest.mark.process, pytest.mark.skipif(not triton_installed(), reason="triton is not installed")]


def compile_all(cache: Path, capabilities: Sequence[int], *flags: str) -> list[dict]:
    """One entry a binary, of all these architectures side by side."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), *map(str, capabilities), *flags]
    worker = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert worker.returncode == 0, worker.stdout[-2000:] + worker.stderr[-4000:]
    lines = worker.stdout.splitlines()
    compiled = [json.loads(line.removeprefix("KERNEL ")) for line in lines if line.startswith("KERNEL ")]
    print(table(compiled))
    return compiled


def table(found: list[dict]) -> str:
    columns = ["kernel", "case", "capability", "warps", "stages", "registers", "spill_bytes", "shared_bytes"]
    rows = [columns, *[[str(entry[name]) for name in columns] for entry in found]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


@pytest.fixture(scope="module", params=[90, pytest.param(80, marks=pytest.mark.full)])
def compiled(request, tmp_path_factory) -> list[dict]:
    return compile_all(tmp_path_factory.mktemp("cache"), [request.param], "--spilling")


def check(found: list[dict]) -> None:
    for entry in found:
        assert entry["cubin_bytes"] > 0, entry
        most_spilled = FP32_SPILL_BYTES if "attention" in entry["kernel"] and "fp32" in entry["case"] else 0
        assert max(entry["spill_bytes"], entry["stack_bytes"]) <= most_spilled, f"spills: {entry}"
        assert entry["shared_bytes"] <= SHARED_BYTES[entry["capability"]], entry
        assert entry["registers"] <= MOST_REGISTERS, entry
        assert entry["registers"] * 32 * entry["warps"] <= REGISTERS, entry


def test_no_kernel_spills_or_asks_for_too_much(compiled):
    check([entry for entry in compiled if entry["case"] != "spilling"])


def test_a_spilling_kernel_would_be_noticed(compiled):
    spilling = [entry for entry in compiled if entry["case"] == "spilling"]
    assert spilling
    for entry in spilling:
        with pytest.raises(AssertionError, match="spills"):
            check([entry])


def test_no_kernel_is_left_out(compiled):
    assert kernels() <= {entry["kernel"] for entry in compiled}


def kernels() -> set[str]:
    """Functions under `@triton.jit` that no other one calls: those are parts."""
    names, called = set(), set()
    for path in (ROOT / "homodistil" / "kernels").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            decorators = [ast.unparse(d) for d in getattr(node, "decorator_list", [])]
            if "triton.jit" in decorators:
                names.add((path.stem, node.name))
                called |= {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
    launched = {f"{stem}.{name}" for stem, name in names if name not in called}
    assert len(launched) >= 3
    return launched


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_whole_matrix(tmp_path):
    check(compile_all(tmp_path, list(SHARED_BYTES), "--full"))
