"""MLM head and losses of both models, forward and backward: rows that are masked against all rows, and ways to do each.

    python benchmarks/head.py                        # 8 x 128 tokens, BERT-base, fp32 and bf16
    python benchmarks/head.py --quick                # under 90 s on 2 cores
    python benchmarks/head.py --json out.json

Transform and decoder of teacher (no gradient) and student, cross-entropy on 15 % of the rows, KL on those or on all.
The ways take turns in one process (A B C A B C ...); ratios are medians over turns. Extra memory is the growth of the
process's peak resident set during one turn (of the allocator's peak on a GPU), weight gradients included.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from memory_counters import memory_in_use, peak_memory, start_peak
from report import environment, environment_text, result_path, row, write, write_json
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM

from homodistil.kernels.masked_lm import linear_masked_lm_losses, masked_lm_losses
from homodistil.models.encoders.bert import BERT as bert

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS, MASKED_SHARE = 128, 0.15
FASTEST = "masked rows"


class Head:
    """Heads of both models and the rows that enter them."""

    def __init__(self, dtype: torch.dtype, batch_size: int, device: torch.device) -> None:
        torch.manual_seed(0)
        config = BertConfig(num_hidden_layers=0)  # the head alone matters
        self.student, self.teacher = (BertForMaskedLM(config).to(device, dtype) for _ in range(2))
        self.teacher.requires_grad_(False)
        num_rows = batch_size * TOKENS
        self.hidden = torch.randn(num_rows, config.hidden_size, device=device, dtype=dtype).requires_grad_()
        self.teacher_hidden = torch.randn_like(self.hidden).mul_(0.1).add_(self.hidden.detach())
        self.masked = torch.randperm(num_rows, device=device)[: round(MASKED_SHARE * num_rows)].sort().values
        self.target_ids = torch.randint(config.vocab_size, (len(self.masked),), device=device)
        self.labels = torch.full((num_rows,), -100, device=device).index_copy_(0, self.masked, self.target_ids)

    def logits(self, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of student and teacher on these rows; None: on all."""
        mine, theirs = self.hidden, self.teacher_hidden
        if index is not None:
            mine, theirs = mine.index_select(0, index), theirs.index_select(0, index)
        return bert.mlm_head(self.student)(mine), bert.mlm_head(self.teacher)(theirs)

    def target_rows(self) -> Tensor:
        ce, kl = masked_lm_losses(*self.logits(self.masked), self.target_ids)
        return (ce + kl) / len(self.masked)

    def masked_rows_eager(self) -> Tensor:
        return eager(*self.logits(self.masked), self.target_ids)

    def all_rows(self) -> Tensor:
        ce, kl = masked_lm_losses(*self.logits(None), self.labels)
        return ce / len(self.masked) + kl / len(self.labels)

    def all_rows_eager(self) -> Tensor:
        return eager(*self.logits(None), self.labels)

    def all_rows_chunked(self) -> Tensor:
        mine, theirs = bert.decoder(self.student), bert.decoder(self.teacher)
        factors = (torch.tensor(1.0 / n, device=self.hidden.device) for n in (len(self.masked), len(self.labels)))
        total, _, _ = linear_masked_lm_losses(
            bert.mlm_transform(self.student)(self.hidden),
            mine.weight,
            mine.bias,
            bert.mlm_transform(self.teacher)(self.teacher_hidden),
            theirs.weight,
            theirs.bias,
            self.labels,
            *factors,
        )
        return total

    @property
    def ways(self) -> dict[str, Callable[[], Tensor]]:
        return {
            FASTEST: self.target_rows,
            "masked rows, eager losses": self.masked_rows_eager,
            "all rows, chunked": self.all_rows_chunked,
            "all rows": self.all_rows,
            "all rows, eager losses": self.all_rows_eager,
        }

    def run(self, way: str) -> tuple[float, float]:
        """Milliseconds of forward and backward, and the loss."""
        self.hidden.grad = None
        self.student.zero_grad(set_to_none=True)
        synchronize(self.hidden.device)
        start = time.perf_counter()
        loss = self.ways[way]()
        loss.backward()
        synchronize(self.hidden.device)
        return (time.perf_counter() - start) * 1e3, loss.item()


def eager(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """As it is usually written, in fp32."""
    student, teacher = student.float(), teacher.float()
    ce = functional.cross_entropy(student, labels)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return ce + functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(dtype: str, batch_size: int, num_turns: int, device: torch.device) -> dict[str, dict]:
    """Way -> milliseconds of every turn, loss and extra bytes."""
    head = Head(DTYPES[dtype], batch_size, device)
    results = {way: {"milliseconds": []} for way in head.ways}
    for turn in range(num_turns + 1):  # the first one warms up and measures memory
        for way, result in results.items():
            if turn == 0:
                gc.collect()
                before = memory_in_use(device)
                start_peak(device)
                _, result["loss"] = head.run(way)
                result["extra_bytes"] = peak_memory(device) - before
            else:
                result["milliseconds"].append(head.run(way)[0])
    check_equal(results)
    return results


def check_equal(results: dict[str, dict]) -> None:
    """All ways over the same rows give the same loss."""
    for kind in ("masked rows", "all rows"):
        losses = [result["loss"] for way, result in results.items() if way.startswith(kind)]
        assert max(losses) - min(losses) < 1e-3 * abs(losses[0]), losses


def ratio(results: dict[str, dict], way: str) -> float:
    """How many times longer than the fastest way: the median over turns."""
    turns = zip(results[way]["milliseconds"], results[FASTEST]["milliseconds"], strict=True)
    return statistics.median(mine / fastest for mine, fastest in turns)


def table(results: dict[str, dict[str, dict]], batch_size: int) -> str:
    title = f"# MLM head and losses, {batch_size} x {TOKENS} tokens, BERT-base, {MASKED_SHARE:.0%} masked"
    lines = [title, "", environment_text(), f"* threads: {torch.get_num_threads()}", ""]
    lines += ["| dtype | way | ms | times the first | extra memory, MB |", "|-|-|-|-|-|"]
    for dtype, ways in results.items():
        for way, result in ways.items():
            milliseconds = statistics.median(result["milliseconds"])
            extra = result["extra_bytes"] / 1e6
            lines.append(f"| {dtype} | {way} | {milliseconds:.0f} | {ratio(ways, way):.1f} | {extra:.0f} |")
    return "\n".join(lines)


def rows(results: dict[str, dict[str, dict]], config: dict) -> list[dict]:
    found = []
    for dtype, ways in results.items():
        for way, result in ways.items():
            found.append(row("head", way, "time", "ms", dtype, result["milliseconds"], config))
            found.append(row("head", way, "times the masked rows", "1", dtype, [ratio(ways, way)], config))
            found.append(row("head", way, "extra memory", "bytes", dtype, [result["extra_bytes"]], config))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 sequences instead of 8, 3 turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write rows here, and nothing under benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size, num_turns = (2, 3) if args.quick else (8, 7)
    results = {dtype: measure(dtype, batch_size, num_turns, device) for dtype in DTYPES}
    text = table(results, batch_size)
    print(text)
    if args.quick and not args.json:
        return
    config = {"quick": args.quick, "batch_size": batch_size, "threads": args.threads, **environment()}
    write_json(args.json or result_path("head", ".json"), rows(results, config))
    if not args.json:
        write(result_path("head", ".md"), text)


if __name__ == "__main__":
    main()
