"""Probe the frozen features of encoders and decoders on packaged STS-B and movie sentences, and print one table.

homodistil probe runs/quickstart/export embedded:minilm-l6
homodistil probe runs/smollm2-half/export --dtype bfloat16 --device cuda
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from homodistil.config.one_line_parser import OneLineParser
from homodistil.config.schema import DataConfig
from homodistil.distributed.graceful_stop import on_signals
from homodistil.evaluation import progress
from homodistil.evaluation.command_line import number

HEADINGS = ("checkpoint", "parameters", "STS-B cosine", "STS-B centred", "STS-B ridge", "movie ridge", "seconds")


def main(argv: list[str]) -> None:
    """The command `homodistil probe`. Raises `UserError`."""
    with progress.watching("loading libraries and sentences"):
        arguments = parser().parse_args(argv)
        # Imported after parsing, so that --help and bad options are fast.
        from homodistil.evaluation.glue.checkpoint import checkpoint_folder
        from homodistil.evaluation.probe.examples import load_examples
        from homodistil.evaluation.trainer_arguments import on_cpu
        from homodistil.metrics.result_table import aligned

        device = "cpu" if on_cpu(arguments.device) else "cuda"
        cache_dir = arguments.cache_dir.expanduser()
        folders = {name: checkpoint_folder(name, cache_dir) for name in arguments.checkpoint}
        examples = load_examples(cache_dir, arguments.limit)
        lines = [list(HEADINGS)]
        with on_signals():
            for name, folder in folders.items():
                with progress.doing(name):
                    lines.append([name, *_line(folder, examples, arguments, device)])
        pairs, movie = len(examples.pairs_dev.labels), len(examples.movie_dev.labels)
        print(f"\nSpearman on {pairs:,} pairs, accuracy on {movie:,} sentences\n\n{aligned(lines)}")


def _line(folder: str, examples, arguments: argparse.Namespace, device: str) -> list[str]:
    from homodistil.evaluation.probe.features import SentenceFeatures
    from homodistil.evaluation.probe.scores import probe

    start = time.perf_counter()
    features = SentenceFeatures(folder, arguments.max_length, device, arguments.dtype)
    scores = probe(features, examples)
    seconds = time.perf_counter() - start
    return [f"{features.num_parameters:,}", *(f"{score:.3f}" for score in scores), f"{seconds:.0f}"]


def parser() -> argparse.ArgumentParser:
    """The options of `homodistil probe`."""
    options = OneLineParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = options.add_argument
    add("checkpoint", nargs="+", metavar="CHECKPOINT", help="folders or hub names of Hugging Face models")
    add("--max-length", type=number(int, 1), default=128, help="tokens per sentence")
    add("--limit", type=number(int, 8), help="only so many examples of each set, to try it out")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and activations")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda: the first visible GPU")
    add("--cache-dir", type=Path, default=Path(DataConfig().cache_dir), help="where packaged data and models are kept")
    return options
