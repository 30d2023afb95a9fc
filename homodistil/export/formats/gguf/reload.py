"""Reads a GGUF file back, with this package's own reader, and compares model and tokenizer with what was exported."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from homodistil.data.sources.gguf.container import read_gguf
from homodistil.errors import UserError
from homodistil.export.formats.exportable import Exportable
from homodistil.export.formats.gguf.architectures import FIELD, architecture_of
from homodistil.export.formats.gguf.hyperparameters import config_of
from homodistil.export.formats.gguf.restored_tokenizer import encoder_of
from homodistil.export.formats.gguf.tensors import load_tensors
from homodistil.export.formats.runners import Runner, torch_runner

TEXTS = (
    "It's 1234567 o'clock, isn't it?  Two  spaces,\ttabs\r\nand\n\n\nlines.   ",
    "Crème brûlée à São Paulo: naïve Ångström — “quotes”… and 3,141.59 €",
    "Привет, мир! Γειά σου Κόσμε. 你好，世界。こんにちは 안녕하세요 नमस्ते",
    "def f(x_1):\n    return x_1 ** 2  # 50% of 0x1F, a/b & <tag>",
    "🙂 emoji 👩‍🔬, UPPER lower MiXeD, HTTPServer2go",
)
"""Compared as token ids."""


def gguf_runner(path: Path, model: Exportable) -> Runner:
    """The model that a file describes, in transformers.

    Args:
        model: what was exported: the class, and settings that GGUF does not have, are taken from it.

    Raises:
        UserError: the file is damaged, or not of such a model.
    """
    file, stock = read_gguf(path, FIELD), model.model
    architecture = architecture_of(stock.config, has_head=stock.base_model is not stock)
    restored = Exportable(type(stock)(config_of(file, stock.config, architecture)).float(), model.max_tokens)
    load_tensors(file, restored.model, architecture)
    return torch_runner(restored)


def check_tokenizer(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `UserError` where the tokenizer that a file describes reads one of `TEXTS` differently."""
    encode = encoder_of(read_gguf(path, FIELD))
    for text in TEXTS:
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        if (actual := encode(text)) != expected:
            raise UserError(
                f"{FIELD}: the file's tokenizer reads {text!r} as {actual}, the model's as {expected}; nothing was "
                f"kept: take another format, and report it"
            )
