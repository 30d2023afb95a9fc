"""Options that `homodistil glue` and `homodistil squad` share. Imports nothing slow, so that --help is fast."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from homodistil.config.one_line_parser import OneLineParser
from homodistil.config.schema import DataConfig


def fine_tuning_parser(
    description: str, lr: Sequence[float], epochs: int, seeds: Sequence[int], max_length: int
) -> argparse.ArgumentParser:
    """A parser with the options for checkpoint, hyperparameter grid, device and output; it raises `UserError`.

    Args:
        description: first line of --help.
        lr, epochs, seeds, max_length: defaults of the options of these names.
    """
    parser = OneLineParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder or hub name of a Hugging Face encoder, or embedded:minilm-l6")
    add("--lr", type=number(float, above=0), nargs="+", default=list(lr), help="learning rates")
    add("--batch-size", type=number(int, 1), nargs="+", default=[32], help="batch sizes")
    add("--epochs", type=number(int, 1), nargs="+", default=[epochs], help="epochs (the learning rate falls over them)")
    add(
        "--seeds",
        type=number(int, 0, 2**32 - 1),
        nargs="+",
        default=list(seeds),
        help="seeds of the new head, data order and dropout",
    )
    add("--max-length", type=number(int, 1), default=max_length, help="tokens per example")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda: the first visible GPU")
    add("--out", type=Path, required=True, help="folder for results; runs that are finished there are not repeated")
    add("--cache-dir", type=Path, default=Path(DataConfig().cache_dir), help="where packaged data and models are kept")
    return parser


def number(
    kind: type, low: float = -math.inf, high: float = 1_000_000, above: float | None = None
) -> Callable[[str], float]:
    """An argparse type for numbers of the type `kind` from `low` to `high` and, if given, greater than `above`."""

    def parse(text: str) -> float:
        try:
            value = kind(text) if text.isascii() and "_" not in text else None
        except ValueError:
            value = None
        if value is None or not low <= value <= high or (above is not None and value <= above):
            what = "whole numbers" if kind is int else "numbers"
            least = f" above {above:g}, up to" if above is not None else f" from {low:.10g} to"
            raise argparse.ArgumentTypeError(f"found {text[:100]!r}, allowed are {what}{least} {high:.10g}")
        return value

    return parse
