"""Who takes the config of a run as a whole (docs/architecture.md): training and the command line."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "homodistil"
TAKES_IT = {
    # The whole config of a run.
    "RunConfig": ("training/", "config/", "cli.py", "api.py"),
    # What the command line was parsed to: the commands pass its config to `training`, and sections to their own rooms.
    "Job": ("config/", "cli.py", "api.py", "train.py", "preflight/__init__.py", "planning/command.py"),
}


def names_in(source: str) -> Iterator[str]:
    """Every name that a module imports, uses, or writes in an annotation; no strings, docstrings and comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name.rpartition(".")[2]


@pytest.mark.parametrize("name", TAKES_IT)
def test_the_whole_config_is_taken_where_the_architecture_says(name):
    modules = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    where = sorted(path for path, source in modules.items() if name in names_in(source))
    assert where and [path for path in where if not path.startswith(TAKES_IT[name])] == []


@pytest.mark.parametrize(
    "source",
    [
        "from homodistil.config.schema import RunConfig",
        "from homodistil.config.schema import RunConfig as Whole",
        "def f(config: schema.RunConfig | None) -> None: ...",
        "config = schema.RunConfig()",
    ],
)
def test_every_way_to_name_it_is_seen(source):
    assert "RunConfig" in names_in(source)
