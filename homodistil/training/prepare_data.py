"""Fetch packaged assets and prepare the corpus ahead of a run, for example on a node that has a network.

    homodistil prepare-data data.sources=[wikipedia,bookcorpus] teacher.name=bert-base-uncased data.workers=16
    homodistil prepare-data --task 3 --tasks 8 ...     # one of eight array tasks that share the work

Training with the same settings then finds everything in data.cache_dir. Killed or stopped (Ctrl-C, SIGTERM, SIGUSR1:
exit code 75), the same command continues with the shards that are finished. The array task that finishes last merges
them; so does a later call without --task.

With teacher.outputs=stored (and a teacher.dtype) the same workers then compute what the teacher says of every text.
"""

from __future__ import annotations

from pathlib import Path

from homodistil.config.command_line import parse
from homodistil.config.plugins import load_plugins
from homodistil.data.prepare.array_tasks import split_task
from homodistil.distributed.graceful_stop import on_signals


def main(argv: list[str]) -> None:
    """The command `homodistil prepare-data`. Raises `UserError`, and `StopRequested` on a signal."""
    task, arguments = split_task(argv)
    config = parse(arguments, f"{__doc__.splitlines()[0]} --task N --tasks M: do only shards N, N + M, ...")
    # After parsing, so that --help and mistakes need no heavy imports.
    from homodistil.data.prepare.corpus import check_sources, prepare_share
    from homodistil.data.prepare.label_choice import label_rule
    from homodistil.data.sources.teachers import cached_teacher
    from homodistil.data.task import settle_task
    from homodistil.distill.teacher import load_config, load_tokenizer
    from homodistil.models import family_of
    from homodistil.training.classifier import labels_task
    from homodistil.training.embedder import is_embedder, settle_texts, teacher_of_folder
    from homodistil.training.length_choice import give_length
    from homodistil.training.prepare_outputs import check_preparable, outputs_of_worker

    with on_signals(how_to_go_on="the same command goes on with the shards that are finished"):
        check_sources(config.data)
        load_plugins(config.teacher.plugins, "teacher.plugins")
        name, cache_dir = config.teacher.name, Path(config.data.cache_dir).expanduser()
        folder = str(cached_teacher(name, cache_dir) or name)
        if Path(folder).expanduser().is_dir():
            folder = str(teacher_of_folder(Path(folder).expanduser()))
        teacher_config = load_config(folder)
        # A missing head changes nothing here: text is framed alike.
        family = family_of(teacher_config.model_type)
        labels = labels_task(config, teacher_config)
        embeds = not labels and is_embedder(config.data, family, folder)
        settle_task(config.data, family.task, config.teacher.name, is_embedder=embeds, labels=labels)
        give_length(config, teacher_config)
        settle_texts(config.data, folder)
        check_preparable(config)
        tokenizer = load_tokenizer(folder, teacher_config, config.data.task)
        corpus = prepare_share(config.data, tokenizer, *task, label_rule(config.data, teacher_config))
        outputs = None
        if config.teacher.is_stored and not isinstance(corpus, str):
            outputs = outputs_of_worker(config, folder, tokenizer, corpus, *task)
    if isinstance(corpus, str):
        print(corpus)
    else:
        print(f"{', '.join(config.data.sources)}: {corpus.description} ({corpus.fingerprint})")
        if config.student.vocab != "all":
            print(f"student.vocab={config.student.vocab}: a run counts the pieces of this text, and tokenises it again")
        if outputs:
            print(outputs)
