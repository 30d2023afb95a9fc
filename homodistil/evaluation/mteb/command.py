"""Score sentence embedders or rerankers on tasks of MTEB and write one table, OUT/mteb.md and mteb.json.

    homodistil mteb --checkpoint BAAI/bge-small-en-v1.5 runs/half/export --tasks NanoBEIR --out runs/mteb
    homodistil mteb --checkpoint embedded:minilm-l6 runs/half/export --tasks my_search/ STSBenchmark --out runs/mteb
    homodistil mteb --checkpoint my-reranker runs/small/export --first-stage my-embedder --tasks my_search/ --out out

Needs the package: pip install 'mteb>=2.26' sentence-transformers. --tasks takes names of MTEB's tasks and benchmarks,
whose data come from the hub, and folders of retrieval data in the format of BEIR: corpus.jsonl (_id, title, text),
queries.jsonl (_id, text) and qrels/test.tsv (query-id, corpus-id, score). A reranker, a sequence classifier of one
label, orders again the --top-k texts that the embedder --first-stage finds for a query; the last column is that
embedder's own score. The shares in the table are of the first checkpoint's scores.
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
        from homodistil.evaluation.mteb import checkpoints
        from homodistil.evaluation.mteb.benchmark import check_installed, open_tasks
        from homodistil.evaluation.mteb.first_stage import FirstStage, check_kinds
        from homodistil.evaluation.mteb.result_table import JSON_FILE
        from homodistil.evaluation.mteb.score_all import score_all
        from homodistil.evaluation.trainer_arguments import on_cpu

        device = "cpu" if on_cpu(arguments.device) else "cuda"
        check_installed()
        check_new(arguments.out, JSON_FILE)
        tasks = open_tasks(arguments.tasks)
        cache_dir = arguments.cache_dir.expanduser()
        models = {name: checkpoints.load(checkpoint_folder(name, cache_dir), device) for name in arguments.checkpoint}
        name, first_stage = arguments.first_stage, None
        check_kinds(models, tasks, name)
        if name:
            embedder = checkpoints.load(checkpoint_folder(name, cache_dir), device)
            first_stage = FirstStage(name, embedder, arguments.top_k)
        with on_signals():
            table = score_all(models, first_stage, tasks, arguments.batch_size, arguments.out)
        print(f"\n{table}\n{arguments.out}/mteb.md")


def parser() -> argparse.ArgumentParser:
    """The options of `homodistil mteb`."""
    options = OneLineParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = options.add_argument
    add(
        "--checkpoint",
        nargs="+",
        required=True,
        help="folders or hub names of embedders, or of rerankers; a column each",
    )
    add(
        "--tasks",
        nargs="+",
        required=True,
        help="names of tasks or benchmarks of MTEB, or folders in the format of BEIR",
    )
    add("--first-stage", metavar="EMBEDDER", help="for rerankers: finds the texts whose order they decide")
    add("--top-k", type=number(int, 1), default=100, help="texts of a query that rerankers order again")
    add("--batch-size", type=number(int, 1), default=32, help="texts at once")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda: the first visible GPU")
    add("--out", type=Path, required=True, help="folder for results, without results of another call")
    add("--cache-dir", type=Path, default=Path(DataConfig().cache_dir), help="where packaged models are kept")
    return options
