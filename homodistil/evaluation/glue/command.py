"""Fine-tune a checkpoint on GLUE and write one table, OUT/glue.md and OUT/glue.json.

    homodistil glue --checkpoint runs/quickstart/export --data embedded --out runs/glue
    homodistil glue --checkpoint bert-base-uncased --data /data/glue_data --lr 2e-5 3e-5 5e-5 \
        --seeds 0 1 2 3 4 --device cuda --precision bf16 --out runs/glue-bert

The same command continues after an interruption: each finished run is a file in OUT.
"""

from __future__ import annotations

import argparse

from homodistil.distributed.graceful_stop import on_signals
from homodistil.evaluation import progress
from homodistil.evaluation.command_line import fine_tuning_parser, number


def main(argv: list[str]) -> None:
    """The command `homodistil glue`. Raises `UserError`."""
    with progress.watching("loading libraries, checkpoint and data"):
        arguments = parser().parse_args(argv)
        # Imported after parsing, so that --help and bad options are fast.
        from homodistil.evaluation.glue.fine_tuning import Settings
        from homodistil.evaluation.glue.grid import Grid, run_grid
        from homodistil.evaluation.glue.result_table import write_table
        from homodistil.evaluation.glue.sources import chosen_tasks

        shared = Settings(
            max_length=arguments.max_length,
            patience=arguments.patience or None,
            device=arguments.device,
            precision=arguments.precision,
        )
        grid = Grid.of(arguments, shared)
        tasks = chosen_tasks(arguments.tasks, arguments.data)
        cache_dir = arguments.cache_dir.expanduser()
        with on_signals():
            records = run_grid(
                arguments.checkpoint, tasks, arguments.data, grid, arguments.out, cache_dir, progress.say
            )
        print(f"\n{write_table(records, arguments.out)}\n{arguments.out}/glue.md")


def parser() -> argparse.ArgumentParser:
    """The options of `homodistil glue`."""
    options = fine_tuning_parser(
        __doc__.splitlines()[0], lr=(2e-5, 5e-5, 1e-4), epochs=3, seeds=(0, 1, 2), max_length=128
    )
    add = options.add_argument
    add("--tasks", default="all", help="comma-separated: cola,sst2,mrpc,stsb,qqp,mnli,qnli,rte,wnli,movie")
    add("--data", default="embedded", help="glue_data folder, hub, or embedded (STS-B and movie sentences)")
    add(
        "--patience",
        type=number(int, 0),
        default=2,
        help="epochs without a better dev score after which to stop; 0: never",
    )
    return options
