"""How fast a stock model is where the job runs: latency of one sequence, tokens/s of a batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

BATCH_SIZE = 32
"""Sequences of the batch that throughput is measured on."""
NUM_WARMUP = 2
NUM_TIMED, LIMIT_S = 15, 3.0
"""At most so many timed passes, and about so many seconds; at least three passes."""


def inference_speed(model: nn.Module, seq_len: int, device: torch.device) -> dict[str, float]:
    """inference_latency_ms (one sequence) and inference_tokens_per_s (32 sequences), medians of whole forward passes.

    fp32, unpadded random tokens, every position's logits, this process's threads alone. The model is put on `device`.

    Args:
        model: stock masked LM in evaluation mode.
        seq_len: tokens of a sequence.
    """
    model = model.to(device)
    vocabulary = model.config.vocab_size
    ids = torch.arange(BATCH_SIZE * seq_len, device=device).view(BATCH_SIZE, seq_len) % vocabulary
    one, many = (_median_s(lambda batch=batch: model(batch), device) for batch in (ids[:1], ids))
    return {"inference_latency_ms": one * 1e3, "inference_tokens_per_s": ids.numel() / many}


def interleaved_medians_s(runs: Sequence[Callable[[], object]], num_rounds: int) -> list[float]:
    """Median seconds of each of `runs` on the CPU. They take turns, so that a busy machine slows all alike.

    Every timed pass follows an untimed one of the same kind: threads of another library that still spin, and caches
    that hold another model, do not count.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(num_rounds):
        for run, measured in zip(runs, seconds, strict=True):
            run()
            before = time.perf_counter()
            run()
            measured.append(time.perf_counter() - before)
    return [statistics.median(measured) for measured in seconds]


@torch.inference_mode()
def _median_s(run: Callable[[], object], device: torch.device) -> float:
    for _ in range(NUM_WARMUP):
        run()
    return statistics.median(_timed(run, device))


def _timed(run: Callable[[], object], device: torch.device) -> Iterator[float]:
    start = time.perf_counter()
    for i in range(NUM_TIMED):
        before = _now(device)
        run()
        yield _now(device) - before
        if i >= 2 and time.perf_counter() - start > LIMIT_S:
            return


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
