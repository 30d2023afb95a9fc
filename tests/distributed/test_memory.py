"""30 consecutive resize events leave nothing behind: benchmarks.memory.resize_events on a tiny model."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.memory import resize_events

NUM_EVENTS = 30
LIVE_TOLERANCE_BYTES = 2048
"""Padding of partitions, and the loss of the last step: far below the 3.5 KB and more that an event frees."""
RESIDENT_TOLERANCE_BYTES = 64 * 1024
"""An event, in fp32. Pages of Python's own heap, measured 3 to 23 KiB: this bound is for what no tensor accounts for.

In bf16 a plain torch model grows by 3 MiB for every new set of shapes (kernels compiled for them): nothing to see.
"""
FIRST = 10
"""At stage 0 the gradients of the last step are still there before the first event."""


def check(engines: list[str], folder) -> None:
    result = folder / "memory.json"
    options = ["--size", "tiny", "--events", str(NUM_EVENTS), "--engines", *engines, "--json", str(result)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["resize_events.py", *options])
        resize_events.main()  # starts ranks of its own, with an allocator of their own
    numbers = {(r["variant"], r["metric"], r["x"]): r["value"] for r in json.loads(result.read_text())}
    for engine in engines:
        first, last = ({m: numbers[engine, m, x] for m in ("accounted", "live")} for x in (FIRST, NUM_EVENTS))
        freed = first["accounted"] - last["accounted"]
        assert freed > 0.25 * first["accounted"]  # the events were real
        # At least: BF16_Optimizer's gradient buffers, which are not accounted for, shrink as well.
        assert first["live"] - last["live"] > freed - LIVE_TOLERANCE_BYTES, engine
        assert abs(numbers[engine, "fresh_difference", "end"] * 1024) < LIVE_TOLERANCE_BYTES, engine
        if engine.endswith("fp32"):
            assert numbers[engine, "resident_slope", "all"] * 1024 < RESIDENT_TOLERANCE_BYTES, engine


def test_memory_follows_the_width(tmp_path):
    check(["ZeRO-2 fp32"], tmp_path)


@pytest.mark.full
def test_memory_follows_the_width_in_every_wrapper(tmp_path):
    check(
        ["ZeRO-3 fp32", "ZeRO-0 fp32", "ZeRO-0 bf16", "ZeRO-1 bf16", "ZeRO-1 bf16, fp32 accumulation", "ZeRO-3 bf16"],
        tmp_path,
    )
