"""Fine-tune a checkpoint on SQuAD and write its scores to OUT/VERSION/squad.md and squad.json.

    homodistil squad --checkpoint runs/quickstart/export --data /data/squad --out runs/squad
    homodistil squad --checkpoint bert-base-uncased --data /data/squad --version v2.0 --lr 3e-5 5e-5 \
        --seeds 0 1 2 --device cuda --precision bf16 --out runs/squad-bert

--data holds train-v1.1.json and dev-v1.1.json, or v2.0. The same command continues after an interruption: each finished
run is a file in OUT, next to a file of its answers for the official evaluation script.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from homodistil.distributed.graceful_stop import on_signals
from homodistil.evaluation import progress
from homodistil.evaluation.command_line import fine_tuning_parser, number


def main(argv: list[str]) -> None:
    """The command `homodistil squad`. Raises `UserError`."""
    with progress.watching("loading libraries, checkpoint and data"):
        arguments = parser().parse_args(argv)
        # Imported after parsing, so that --help and bad options are fast.
        from homodistil.evaluation.squad.examples import load_squad

        data = load_squad(arguments.data, arguments.version)
        from homodistil.evaluation.glue.grid import Grid
        from homodistil.evaluation.squad.fine_tuning import Settings
        from homodistil.evaluation.squad.grid import run_grid, write_table

        shared = Settings(
            max_length=arguments.max_length,
            stride=arguments.stride,
            max_answer_tokens=arguments.max_answer_tokens,
            null_threshold=arguments.null_threshold,
            device=arguments.device,
            precision=arguments.precision,
        )
        grid = Grid.of(arguments, shared)
        cache_dir = arguments.cache_dir.expanduser()
        with on_signals():
            records = run_grid(arguments.checkpoint, data, grid, arguments.out, cache_dir, progress.say)
        print(f"\n{write_table(records, arguments.out)}\n{arguments.out / data.version / 'squad.md'}")


def parser() -> argparse.ArgumentParser:
    """The options of `homodistil squad`."""
    options = fine_tuning_parser(__doc__.splitlines()[0], lr=(5e-5,), epochs=2, seeds=(0,), max_length=384)
    add = options.add_argument
    add("--data", type=Path, required=True, help="folder with train-v*.json and dev-v*.json")
    add("--version", choices=("v1.1", "v2.0"), help="required if the folder has both")
    add("--stride", type=number(int, 0), default=128, help="tokens of context that consecutive windows share")
    add("--max-answer-tokens", type=number(int, 1), default=30, help="maximum length of an answer in tokens")
    threshold = number(float, -1_000_000)
    add("--null-threshold", type=threshold, default=0.0, help="v2.0: no answer if its score is higher by this")
    return options
