"""Fetch packaged assets and prepare the corpus ahead of a run, for example on a node that has a network.

    python launcher/prepare_data.py data.sources=[wikipedia,bookcorpus] teacher.name=bert-base-uncased data.workers=16
    python launcher/prepare_data.py --task 3 --tasks 8 ...     # one of eight array tasks that share the work

Training with the same settings then finds everything in data.cache_dir. Killed or stopped (Ctrl-C, SIGTERM, SIGUSR1:
exit code 75), the same command goes on with the shards that are finished. The array task that finishes last merges
them; so does a later call without --task.
"""

from __future__ import annotations

import sys
from pathlib import Path

from homodistil.distributed.graceful_stop import handle_signals, on_signals

handle_signals()  # first of all: what follows takes seconds

from homodistil.config.command_line import parse  # noqa: E402
from homodistil.data.prepare.array_tasks import split_task  # noqa: E402
from homodistil.distributed.script_exit import exit_with_code  # noqa: E402


def main() -> None:
    with exit_with_code():
        task, arguments = split_task(sys.argv[1:])
        config = parse(arguments, f"{__doc__.splitlines()[0]} --task N --tasks M: do only shards N, N + M, ...")
        # After parsing, so that --help and mistakes need no heavy imports.
        from homodistil.data.prepare.corpus import check_sources, prepare_share
        from homodistil.data.sources import assets
        from homodistil.distill.teacher import load_config, load_tokenizer

        with on_signals(how_to_go_on="the same command goes on with the shards that are finished"):
            check_sources(config.data)
            folder = config.teacher.name
            if assets.is_embedded(folder):
                assets.check_teacher(folder)
                folder = str(assets.teacher_folder(folder, Path(config.data.cache_dir).expanduser()))
            tokenizer = load_tokenizer(folder, load_config(folder).vocab_size)
            corpus = prepare_share(config.data, tokenizer, *task)
        if isinstance(corpus, str):
            print(corpus)
        else:
            print(f"{', '.join(config.data.sources)}: {corpus.description} ({corpus.fingerprint})")


if __name__ == "__main__":
    main()
