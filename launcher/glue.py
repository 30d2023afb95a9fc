"""Fine-tune a checkpoint on GLUE and write one table, OUT/glue.md and OUT/glue.json.

    python launcher/glue.py --checkpoint runs/quickstart/export --data embedded --out runs/glue
    python launcher/glue.py --checkpoint bert-base-uncased --data /data/glue_data --lr 2e-5 3e-5 5e-5 \
        --seeds 0 1 2 3 4 --device cuda --precision bf16 --out runs/glue-bert

The same command goes on after an interruption: each finished run is a file in OUT.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from homodistil.cli import exit_with_code
from homodistil.config import DataConfig


def main() -> None:
    arguments = _parser().parse_args()
    with exit_with_code():
        # After parsing, so that --help and mistakes need no heavy imports.
        from homodistil.evaluation.glue.fine_tuning import Settings
        from homodistil.evaluation.glue.grid import Grid, run_grid
        from homodistil.evaluation.glue.sources import chosen_tasks
        from homodistil.evaluation.glue.table import write_table

        shared = Settings(
            max_length=arguments.max_length,
            patience=arguments.patience or None,
            device=arguments.device,
            precision=arguments.precision,
        )
        grid = Grid(
            lrs=arguments.lr,
            batch_sizes=arguments.batch_size,
            epochs=arguments.epochs,
            seeds=arguments.seeds,
            shared=shared,
        )
        tasks = chosen_tasks(arguments.tasks, arguments.data)
        cache_dir = arguments.cache_dir.expanduser()
        say = lambda line: print(line, flush=True)  # noqa: E731
        records = run_grid(arguments.checkpoint, tasks, arguments.data, grid, arguments.out, cache_dir, say)
        print(f"\n{write_table(records, arguments.out)}\n{arguments.out}/glue.md")


def _parser() -> argparse.ArgumentParser:
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(description=lines[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder or hub name of a Hugging Face encoder, or embedded:minilm-l6")
    add("--tasks", default="all", help="comma-separated: cola,sst2,mrpc,stsb,qqp,mnli,qnli,rte,wnli,movie")
    add("--data", default="embedded", help="glue_data folder, hub, or embedded (STS-B and movie sentences)")
    add("--lr", type=_positive(float), nargs="+", default=[2e-5, 5e-5, 1e-4], help="learning rates")
    add("--batch-size", type=_positive(int), nargs="+", default=[32], help="batch sizes")
    add("--epochs", type=_positive(int), nargs="+", default=[3], help="epochs (the learning rate falls over them)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of head, order and dropout")
    add("--patience", type=int, default=2, help="stop after so many epochs without a better dev score; 0: never")
    add("--max-length", type=_positive(int), default=128, help="tokens of a sentence or pair")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda: the first visible GPU")
    add("--out", type=Path, required=True, help="folder for results; what is finished there is not run again")
    add("--cache-dir", type=Path, default=Path(DataConfig().cache_dir), help="where packaged data and models are kept")
    return parser


def _positive(kind: type):
    def number(text: str):
        if not 0 < (value := kind(text)) < float("inf"):
            raise ValueError
        return value

    number.__name__ = f"positive {kind.__name__}"  # argparse's message names it
    return number


if __name__ == "__main__":
    main()
