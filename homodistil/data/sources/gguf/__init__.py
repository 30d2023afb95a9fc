"""Llama models in GGUF files, the format of llama.cpp, made into stock Hugging Face folders.

    convert(Path("SmolLM2-135M-Instruct.Q4_1.gguf"), folder, "teacher.name")

container.py reads the file, quantisation.py its tensors, model.py makes configuration and weights of them,
tokenizer.py the tokenizer, convert.py the folder.
"""

from __future__ import annotations

VERSION = 1
"""Of the folders; raise it when the conversion changes."""


def is_gguf(name: str) -> bool:
    """Whether a teacher's name is that of a GGUF file, by its ending."""
    return name.lower().endswith(".gguf")
