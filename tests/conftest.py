"""Fixtures shared by all tests: real packaged assets, fetched once into the cache."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import setuptools  # noqa: F401  torch imports it to compile, and it fails where another library took distutils first
from hypothesis import settings
from support.job_fixtures import reference, run_inputs, server  # noqa: F401

# Machines are shared and noisy: a slow example is no failure.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

ONLY_IN_FULL = [
    line
    for line in Path(__file__).with_name("only_in_full.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what only_in_full.txt names."""
    for item in items:
        name = f"{item.path.name}::{item.nodeid.partition('::')[2]}"
        if name.startswith(tuple(ONLY_IN_FULL)):
            item.add_marker(pytest.mark.full)


gc.disable()  # nothing of what is imported for the tests can be freed


def pytest_collection_finish() -> None:
    """What the imports have made stays: the collector need not look through it, which takes .4 s each time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def own_rank_variables():
    """A module whose tests are a rank themselves leaves no RANK or port to processes that later ones start."""
    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """Where packaged teachers and text are kept between runs (HOMODISTIL_CACHE, else the default cache)."""
    return Path(os.environ.get("HOMODISTIL_CACHE", "~/.cache/homodistil")).expanduser()


@pytest.fixture(scope="session")
def tokenizer(cache_dir):
    """The real uncased WordPiece tokenizer of the packaged BERT-tiny."""
    from transformers import AutoTokenizer

    from homodistil.data.sources.assets import teacher_folder

    return AutoTokenizer.from_pretrained(teacher_folder("embedded:bert-tiny", cache_dir))
