"""Fetch packaged assets and prepare the corpus ahead of a run, for example on a node that has a network.

    python launcher/prepare_data.py data.sources=[wikipedia,bookcorpus] teacher.name=bert-base-uncased

Training with the same settings then finds everything in data.cache_dir.
"""

from __future__ import annotations

import sys
from pathlib import Path

from homodistil.cli import exit_with_code, parse


def main() -> None:
    with exit_with_code():
        config = parse(sys.argv[1:], __doc__.splitlines()[0])
        # After parsing, so that --help and mistakes need no heavy imports.
        from homodistil.data import assets
        from homodistil.data.corpus import check_sources, prepare_corpus
        from homodistil.distill.teacher import load_config, load_tokenizer

        check_sources(config.data)
        folder = config.teacher.name
        if assets.is_embedded(folder):
            assets.check_teacher(folder)
            folder = str(assets.teacher_folder(folder, Path(config.data.cache_dir).expanduser()))
        tokenizer = load_tokenizer(folder, load_config(folder).vocab_size)
        corpus = prepare_corpus(config.data, tokenizer)
        print(f"{', '.join(config.data.sources)}: {corpus.description} ({corpus.fingerprint})")


if __name__ == "__main__":
    main()
