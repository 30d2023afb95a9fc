"""Which terms a run trains: those of its config's weights, also ones that the package does not know of.

A term from outside is a class that `register` (term.py) has seen: loss.plugins names what is imported for that, on
every rank and wherever a config is judged or planned, and loss.extra gives its weight.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from homodistil.config.schema import LossConfig
from homodistil.distill.losses.term import Term, registered
from homodistil.errors import UserError, nearest
from homodistil.models.axes import Widths


def active_terms(loss: LossConfig) -> list[Term]:
    """Terms with a weight above 0, in the order in which they are compared.

    Raises:
        UserError: a plugin cannot be imported, or nothing is registered for a name of loss.extra.
    """
    load_plugins(loss.plugins)
    known = registered()
    for name in loss.extra:
        _check_name(name, loss, list(known))
    classes = dict.fromkeys(term for name, term in known.items() if name in loss.weights)
    return [term(loss) for term in classes]


def check_terms(loss: LossConfig, teacher: Widths, student: Sequence[Widths]) -> None:
    """Raise `UserError` when a term cannot be taken between these widths (see `Term.check`)."""
    for term in active_terms(loss):
        term.check(teacher, student)


def field_of(loss: LossConfig, name: str) -> str:
    """Name of the config field that holds the weight of a term: loss.kl, loss.extra.gram."""
    return f"loss.extra.{name}" if name in loss.extra else f"loss.{name}"


def load_plugins(names: Sequence[str]) -> None:
    """Import what registers further terms; nothing happens for what has been imported before.

    Args:
        names: of modules that Python finds, or paths of files (.py).

    Raises:
        UserError: one cannot be imported.
    """
    for name in names:
        try:
            _import_file(Path(name).expanduser().resolve()) if name.endswith(".py") else importlib.import_module(name)
        except Exception as error:  # whatever the module itself does
            text = " ".join(str(error).split())[:200]
            raise UserError(
                f"loss.plugins: cannot import {name!r} ({type(error).__name__}: {text}); allowed is a file such as "
                f"./my_terms.py, or a module that Python finds on every machine (PYTHONPATH, or installed)"
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


def _check_name(name: str, loss: LossConfig, known: list[str]) -> None:
    if hasattr(loss, name):
        raise UserError(f"loss.extra: found {name!r}, which has a field of its own; set loss.{name}")
    if name not in known:
        outside = [term for term in known if not hasattr(loss, term)]
        raise UserError(
            f"loss.extra: found {name!r}, allowed are names of registered terms: {', '.join(outside) or 'none so far'}"
            f"{nearest(name, outside)}; name the module that registers it in loss.plugins"
        )
