"""How large the experiment is: steps, batches and examples at full size, and at a part of it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.environment import ROOT
from experiments.quality.options import Options

RATES = (5e-4, 1e-3, 2e-3)
"""Learning rates that every arm is tried with."""


@dataclass(frozen=True)
class Sizes:
    """Of a run and of what is measured of it; `scaled` makes smaller ones."""

    steps: int = 3000
    rate_steps: int = 600
    """Of a run that chooses the learning rate."""
    correction_steps: int = 3000
    sequences: int = 64
    """Per step, of 128 tokens."""
    compensation_sequences: int = 512
    eval_blocks: int = 1024
    """Held-out blocks a half."""
    probe_examples: int | None = None
    """Of each set of the frozen probes (None: all)."""
    is_whole: bool = True

    @property
    def overrides(self) -> tuple[str, ...]:
        return (
            f"teacher.correction_steps={self.correction_steps}",
            f"train.global_batch_size={self.sequences}",
            f"train.micro_batch_size={self.sequences}",
            f"pruning.compensation_sequences={self.compensation_sequences}",
        )


def scaled(scale: float) -> Sizes:
    """`scale` of the steps and examples, its square root of the batch; nothing is left out.

    Args:
        scale: in (0, 1].
    """
    full = Sizes()
    if scale == 1:
        return full

    def part(number: float, least: int, of: float = scale) -> int:
        return max(least, round(number * of))

    return Sizes(
        steps=part(full.steps, 8),
        rate_steps=part(full.rate_steps, 4),
        correction_steps=part(full.correction_steps, 4),
        sequences=part(full.sequences, 8, scale**0.5),
        compensation_sequences=part(full.compensation_sequences, 16),
        eval_blocks=part(full.eval_blocks, 8),
        probe_examples=part(3000, 64),
        is_whole=False,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the table, and for what the command continues from")
    add("--teacher", default="embedded:minilm-l6", help="an encoder: packaged, folder or hub name")
    add("--text", nargs="+", default=["embedded"], help="text to train on (data.sources)")
    add("--scale", type=_share, default=1.0, help="part of the full size, in (0, 1]")
    add("--minutes", type=float, help="stop beginning phases that would not end in time (default: no limit)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first chooses the rates and has all arms")
    add("--workers", type=int, default=2, help="processes that share the GPU, or of one thread each")
    add("--deepspeed", type=Path, default=ROOT / "ds_configs" / "zero2.json", help="precision, stage")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="of every run, behind its arm's")
    add("--list", action="store_true", help="print the phases and their runs; make none")


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"found {text}, allowed are numbers in (0, 1]")
    return value


def options_of(args: argparse.Namespace, sizes: Sizes, widths: tuple[str, ...], arms: tuple[str, ...]) -> Options:
    """The harness's options for this experiment."""
    return Options(
        study="gpu_quality",
        steps=sizes.steps,
        rates=RATES,
        seeds=tuple(args.seeds),
        widths=widths,
        arms=arms,
        work=args.out / "work",
        workers=args.workers,
        deepspeed=args.deepspeed,
        quick=not sizes.is_whole,
        set=tuple(args.set),
        tune=True,
        base="",
        budget_minutes=args.minutes,
        eval_blocks=sizes.eval_blocks,
    )
