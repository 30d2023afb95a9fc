"""homodistil: make a small Transformer out of a big one, a little at a time, in one DeepSpeed job.

    run = homodistil.distill("bert-base-uncased", text=["corpus.jsonl"], hidden_size=384, steps=2000, out="runs/half")
    config = homodistil.load_recipe("quickstart")          # a homodistil.RunConfig

Importing this package imports neither torch nor anything else that takes time; the names below are loaded when used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from homodistil.api import Distilled as Distilled
    from homodistil.api import distill as distill
    from homodistil.api import load_recipe as load_recipe
    from homodistil.config.schema import RunConfig as RunConfig
    from homodistil.errors import UserError as UserError

__version__ = "0.1.0"
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
