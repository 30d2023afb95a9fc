"""Score decoders on tasks of EleutherAI's lm-evaluation-harness and write one table, OUT/lm_eval.md and lm_eval.json.

    homodistil lm-eval --checkpoint runs/half/export --tasks lambada_openai arc_easy --device cuda --out runs/lm-eval
    homodistil lm-eval --checkpoint models/llama runs/half/export --tasks my_tasks/ --limit 100 --out runs/lm-eval

Needs the harness: pip install 'lm_eval>=0.4.13,<0.5'. A task is a name that the harness knows, whose data come from the
hub, or a task file (YAML) or a folder of such, whose data may be local files.
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
    """The command `homodistil lm-eval`. Raises `UserError`."""
    with progress.watching("loading libraries, tasks and checkpoints"):
        arguments = parser().parse_args(argv)
        # Imported after parsing, so that --help and bad options are fast.
        from homodistil.evaluation.glue.checkpoint import checkpoint_folder
        from homodistil.evaluation.glue.grid import check_new
        from homodistil.evaluation.lm_eval.harness import check_checkpoint, check_installed, open_tasks, score
        from homodistil.evaluation.lm_eval.result_table import JSON_FILE, write_table

        cache_dir = arguments.cache_dir.expanduser()
        folders = {name: checkpoint_folder(name, cache_dir) for name in arguments.checkpoint}
        for folder in folders.values():
            check_checkpoint(folder)
        check_installed()
        check_new(arguments.out, JSON_FILE)
        tasks = open_tasks(arguments.tasks)
        scores = {}
        with on_signals():
            for name, folder in folders.items():
                with progress.doing(name):
                    scores[name] = score(folder, tasks, arguments)
                # After each checkpoint: what is finished is kept, whatever happens to the next one.
                table = write_table(scores, arguments.out)
        print(f"\n{table}\n{arguments.out}/lm_eval.md")


def parser() -> argparse.ArgumentParser:
    """The options of `homodistil lm-eval`; those of the scoring have the harness's names."""
    options = OneLineParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = options.add_argument
    add("--checkpoint", nargs="+", required=True, help="folders or hub names of Hugging Face decoders; a column each")
    add("--tasks", nargs="+", required=True, help="names of tasks, task files (YAML), or folders of task files")
    add("--num-fewshot", type=number(int, 0), help="examples before each question (default: the task's)")
    add("--limit", type=number(int, 1), help="only the first so many examples of each task, to try it out")
    add("--batch-size", type=number(int, 1), default=8, help="requests at once")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="auto: the checkpoint's")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda: the first visible GPU")
    add("--out", type=Path, required=True, help="folder for results, without results of another call")
    add("--cache-dir", type=Path, default=Path(DataConfig().cache_dir), help="where packaged models are kept")
    return options
