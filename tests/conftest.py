"""Fixtures shared by all tests: real packaged assets, fetched once into the cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Machines are shared and noisy: a slow example is no failure.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """Where packaged teachers and text are kept between runs (HOMODISTIL_CACHE, else the default cache)."""
    return Path(os.environ.get("HOMODISTIL_CACHE", "~/.cache/homodistil")).expanduser()


@pytest.fixture(scope="session")
def tokenizer(cache_dir):
    """The real uncased WordPiece tokenizer of the packaged BERT-tiny."""
    from transformers import AutoTokenizer

    from homodistil.data.assets import teacher_folder

    return AutoTokenizer.from_pretrained(teacher_folder("embedded:bert-tiny", cache_dir))
