"""Opens a stock checkpoint for export and timing: which part of it is a model, which head it has, and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import PretrainedConfig

from homodistil.data.sources import assets
from homodistil.errors import UserError
from homodistil.evaluation.glue.checkpoint import FIELD, checkpoint_folder, load_model, max_tokens
from homodistil.export.formats.exportable import Exportable
from homodistil.models.checkpoint_files import local_folder
from homodistil.models.config_file import read_config
from homodistil.models.sentence_modules import MODULES_FILE, transformer_path

_HEADS = {
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
}
"""End of `architectures` in config.json -> the class that loads it."""
_LONGEST = 512
"""Tokens, of a model whose configuration names no limit."""


class StockCheckpoint(NamedTuple):
    """A folder or hub name with a model in it."""

    name: str
    """As the user gave it."""
    source: str
    """The folder (of a packaged model: in the cache), or the hub name."""
    inside: str
    """Where the Transformer is, below the folder; "": the folder itself, as in all but sentence-transformers'."""
    config: PretrainedConfig

    @property
    def place(self) -> str:
        """Folder or hub name of the Transformer."""
        return str(Path(self.source) / self.inside) if self.inside else self.source

    @property
    def is_packaged(self) -> bool:
        return assets.is_embedded(self.name)

    @property
    def folder(self) -> Path | None:
        """The folder; None for a hub name."""
        return local_folder(self.source, FIELD)

    @property
    def has_modules(self) -> bool:
        """Whether it is a folder of sentence-transformers, whose other modules pool."""
        return self.folder is not None and (self.folder / MODULES_FILE).is_file()

    def auto_class(self, with_head: bool) -> str:
        """Name of the class of transformers that loads what is exported.

        Raises:
            UserError: `with_head`, and config.json names a head that is not exported.
        """
        architecture = (self.config.architectures or ["Model"])[0]
        if not with_head or self.has_modules or architecture.endswith("Model") and "LMHead" not in architecture:
            return "AutoModel"
        for end, auto_class in _HEADS.items():
            if architecture.endswith(end):
                return auto_class
        raise UserError(
            f"{FIELD}: {self.name!r} is a {architecture}; exported are backbones and {', '.join(_HEADS)}; "
            f"add --no-head to export its backbone"
        )

    @property
    def max_tokens(self) -> int:
        """Of the longest sequence that it takes."""
        return max_tokens(self.config, _LONGEST)

    def num_parameters(self, with_head: bool) -> int:
        """By the configuration alone, tied parameters once; without a head also without a pooler."""
        with torch.device("meta"):
            model = getattr(transformers, self.auto_class(with_head)).from_config(self.config)
        return Exportable(model, self.max_tokens).num_parameters()

    def load(self, with_head: bool) -> Exportable:
        """The model in fp32 on the CPU. Raises `UserError`: see `auto_class` and `load_model`."""
        auto_class = self.auto_class(with_head)
        model = load_model(getattr(transformers, auto_class), self.place, has_head=auto_class != "AutoModel")
        return Exportable(model, self.max_tokens)


def open_checkpoint(name: str, cache_dir: Path) -> StockCheckpoint:
    """Find the model that `name` means and read its configuration.

    Raises:
        UserError: there is none, or the first module of a sentence-transformers folder is no Transformer.
    """
    source = checkpoint_folder(name, cache_dir)
    inside = transformer_path(Path(source), FIELD) if Path(source).is_dir() else ""
    return StockCheckpoint(name, source, inside, read_config(str(Path(source) / inside) if inside else source, FIELD))
