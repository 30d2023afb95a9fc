"""Options that launcher/glue.py and launcher/squad.py share. No heavy imports, so that --help is quick."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from homodistil.config import DataConfig


def fine_tuning_parser(
    description: str, lr: Sequence[float], epochs: int, seeds: Sequence[int], max_length: int
) -> argparse.ArgumentParser:
    """A parser with checkpoint, grid, device and output; the other arguments are defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder or hub name of a Hugging Face encoder, or embedded:minilm-l6")
    add("--lr", type=positive(float), nargs="+", default=list(lr), help="learning rates")
    add("--batch-size", type=positive(int), nargs="+", default=[32], help="batch sizes")
    add("--epochs", type=positive(int), nargs="+", default=[epochs], help="epochs (the learning rate falls over them)")
    add("--seeds", type=int, nargs="+", default=list(seeds), help="seeds of head, order and dropout")
    add("--max-length", type=positive(int), default=max_length, help="tokens of an example")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda: the first visible GPU")
    add("--out", type=Path, required=True, help="folder for results; what is finished there is not run again")
    add("--cache-dir", type=Path, default=Path(DataConfig().cache_dir), help="where packaged data and models are kept")
    return parser


def positive(kind: type) -> Callable[[str], float]:
    """An argparse type: a positive finite number of `kind`."""

    def number(text: str) -> float:
        if not 0 < (value := kind(text)) < float("inf"):
            raise ValueError
        return value

    number.__name__ = f"positive {kind.__name__}"  # argparse's message names it
    return number
