"""Which terms a run trains: those of its config's weights, also ones that the package does not know of.

A term from outside is a class that `register` (term.py) has seen: loss.plugins names what is imported for that, on
every rank and wherever a config is judged or planned, and loss.extra gives its weight.
"""

from __future__ import annotations

from collections.abc import Sequence

from homodistil.config.plugins import load_plugins
from homodistil.config.schema import LossConfig
from homodistil.distill.losses.term import Term, registered
from homodistil.errors import UserError, nearest
from homodistil.models.axes import Widths


def active_terms(loss: LossConfig) -> list[Term]:
    """Terms with a weight above 0, in the order in which they are compared.

    Raises:
        UserError: a plugin cannot be imported, or nothing is registered for a name of loss.extra.
    """
    load_plugins(loss.plugins, "loss.plugins")
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


def _check_name(name: str, loss: LossConfig, known: list[str]) -> None:
    if hasattr(loss, name):
        raise UserError(f"loss.extra: found {name!r}, which has a field of its own; set loss.{name}")
    if name not in known:
        outside = [term for term in known if not hasattr(loss, term)]
        raise UserError(
            f"loss.extra: found {name!r}, allowed are names of registered terms: {', '.join(outside) or 'none so far'}"
            f"{nearest(name, outside)}; name the module that registers it in loss.plugins"
        )
