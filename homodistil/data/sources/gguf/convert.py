"""A GGUF file of a Llama -> a Hugging Face folder that `from_pretrained` reads without knowing of GGUF."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from homodistil.data.sources.gguf.container import read_gguf
from homodistil.data.sources.gguf.model import parameter, read_config, sources
from homodistil.data.sources.gguf.tokenizer import write_tokenizer


def convert(path: Path, folder: Path, field: str) -> None:
    """Fill `folder` with config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

    The weights are float32: fewer bits would round what the file says (quantisation.py). All of them are in memory at
    once, 4 bytes a parameter.

    Args:
        folder: exists, and is empty.
        field: what the user gave `path` as, for messages: teacher.name.

    Raises:
        UserError: damaged, not a Llama, or with parts that are not read; nothing of use is in `folder` then.
        OSError: `folder` cannot be written.
    """
    file = read_gguf(path, field)
    config = read_config(file)
    places = sources(file, config)
    write_tokenizer(file, folder)
    config.save_pretrained(folder)
    weights = {name: torch.from_numpy(parameter(file, source)) for name, source in places.items()}
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # the library's is its owner's alone
