"""Imports modules of a user's own that register a loss term (loss.plugins) or a model family (teacher.plugins)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from homodistil.errors import UserError


def load_plugins(names: Sequence[str], field: str) -> None:
    """Import modules by name; nothing happens for those that have been imported before. They run as the user's code.

    Args:
        names: of modules that Python finds, or paths of files (.py).
        field: what the user gave them as, for messages.

    Raises:
        UserError: one cannot be imported.
    """
    for name in names:
        try:
            _import_file(Path(name).expanduser().resolve()) if name.endswith(".py") else importlib.import_module(name)
        except UserError:
            raise
        except Exception as error:  # whatever the module itself does
            text = " ".join(str(error).split())[:200]
            raise UserError(
                f"{field}: cannot import {name!r} ({type(error).__name__}: {text}); allowed is a file such as "
                f"./my_plugin.py, or a module that Python finds on every machine (PYTHONPATH, or installed)"
            ) from None


def _import_file(path: Path) -> None:
    name = f"homodistil_plugin_{path.stem}"
    if getattr(sys.modules.get(name), "__file__", None) == str(path):
        return
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
