"""What the GGUF files of a checkpoint hold beside its weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from homodistil.export.formats.layout import FORMATS

if TYPE_CHECKING:
    from homodistil.export.formats.gguf.header import Header
    from homodistil.training.stock_checkpoint import StockCheckpoint

_WITHOUT_HEAD = ("AutoModel", "AutoModelForMaskedLM")
"""Classes of models whose file has none: llama.cpp takes vectors from an encoder, and predicts no masked tokens."""


def gguf_header(checkpoint: StockCheckpoint, names: Iterable[str], with_head: bool) -> Header | None:
    """None where no format of `names` is GGUF.

    Raises:
        UserError: llama.cpp computes no such model, or has no such tokenizer. No weights are loaded for that.
    """
    if not any(FORMATS[name].extra == "gguf" for name in names):
        return None
    # Imported here because its package may be missing where no GGUF is wanted.
    from homodistil.export.formats.gguf.header import header_of

    has_head = checkpoint.auto_class(with_head) not in _WITHOUT_HEAD
    modules = checkpoint.source if checkpoint.has_modules else None
    return header_of(checkpoint.place, checkpoint.config, has_head, modules, plain_name(checkpoint))


def plain_name(checkpoint: StockCheckpoint) -> str:
    """Of a hub name or package, without its owner; of a folder its last part."""
    name = checkpoint.name if checkpoint.folder is None or checkpoint.is_packaged else str(checkpoint.folder.resolve())
    return name.rpartition("/")[2].rpartition(":")[2]
