"""homodistil: make a small Transformer out of a big one, a little at a time, in one DeepSpeed job.

    run = homodistil.distill("bert-base-uncased", text=["corpus.jsonl"], hidden_size=384, steps=2000, out="runs/half")
    config = homodistil.load_recipe("quickstart")          # a homodistil.RunConfig

Importing this package imports neither torch nor anything else that takes time; the names below are loaded when used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

__version__ = "0.2.0"
_PLACES = {
    "distill": "homodistil.api",
    "Distilled": "homodistil.api",
    "load_recipe": "homodistil.api",
    "RunConfig": "homodistil.config.schema",
    "UserError": "homodistil.errors",
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'homodistil' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})


class _Package(ModuleType):
    """`homodistil.distill` is the function, also after a module of the subpackage with the same name is imported.

    Import hands a subpackage to its parent as an attribute, which would hide the function. The modules in it are
    imported by their full names (`from homodistil.distill.student import Student`), which needs no attribute.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == "distill" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
