"""Score sentence embedders on tasks of MTEB and write one table, OUT/mteb.md and mteb.json.

    homodistil mteb --checkpoint BAAI/bge-small-en-v1.5 runs/half/export --tasks NanoBEIR --out runs/mteb
    homodistil mteb --checkpoint embedded:minilm-l6 runs/half/export --tasks my_search/ STSBenchmark --out runs/mteb

Needs the package: pip install 'mteb>=2.26' sentence-transformers. --tasks takes names of MTEB's tasks and benchmarks,
whose data come from the hub, and folders of retrieval data in the format of BEIR: corpus.jsonl (_id, title, text),
queries.jsonl (_id, text) and qrels/test.tsv (query-id, corpus-id, score). The shares in the table are of the first
checkpoint's scores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from homodistil.config.one_line_parser import OneLineParser
from homodistil.config.schema import DataConfig
from homodistil.distributed.graceful_stop import on_signals
from homodistil.evaluation import progress
from homodistil.evaluation.command_line import number


def main(argv: list[str]) -> None:
    """The command `homodistil mteb`. Raises `UserError`."""
    with progress.watching("loading libraries, tasks and checkpoints"):
        arguments = parser().parse_args(argv)
        # Imported after parsing, so that --help and bad options are fast.
        from homodistil.evaluation.glue.checkpoint import checkpoint_folder
        from homodistil.evaluation.glue.grid import check_new
        from homodistil.evaluation.mteb.benchmark import check_installed, load_embedder, open_tasks, score
        from homodistil.evaluation.mteb.result_table import JSON_FILE, Scores, write_table
        from homodistil.evaluation.trainer_arguments import on_cpu

        device = "cpu" if on_cpu(arguments.device) else "cuda"
        check_installed()
        check_new(arguments.out, JSON_FILE)
        tasks = open_tasks(arguments.tasks)
        cache_dir = arguments.cache_dir.expanduser()
        models = {name: load_embedder(checkpoint_folder(name, cache_dir), device) for name in arguments.checkpoint}
        scores = Scores({name: model.identity for name, model in models.items()})
        with on_signals():
            for task in tasks:
                for name, model in models.items():
                    with progress.doing(f"{name} on {task.metadata.name}"):
                        scores.add(name, score(model, task, arguments.batch_size))
                    # After each score: what is finished is kept, whatever happens to the next one.
                    table = write_table(scores, arguments.out)
                task.unload_data()
        print(f"\n{table}\n{arguments.out}/mteb.md")


def parser() -> argparse.ArgumentParser:
    """The options of `homodistil mteb`."""
    options = OneLineParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = options.add_argument
    add("--checkpoint", nargs="+", required=True, help="folders or hub names of sentence-transformers; a column each")
    add(
        "--tasks",
        nargs="+",
        required=True,
        help="names of tasks or benchmarks of MTEB, or folders in the format of BEIR",
    )
    add("--batch-size", type=number(int, 1), default=32, help="texts at once")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda: the first visible GPU")
    add("--out", type=Path, required=True, help="folder for results, without results of another call")
    add("--cache-dir", type=Path, default=Path(DataConfig().cache_dir), help="where packaged models are kept")
    return options
