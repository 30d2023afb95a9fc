"""Decoder families: one module per family. A new one is registered here."""

from __future__ import annotations

from homodistil.models.decoders.gemma import GEMMA, GEMMA3
from homodistil.models.decoders.gpt2 import GPT2
from homodistil.models.decoders.llama import LLAMA, QWEN3
from homodistil.models.decoders.olmo2 import OLMO2
from homodistil.models.family import ModelFamily

DECODERS: tuple[ModelFamily, ...] = (LLAMA, QWEN3, GEMMA, GEMMA3, OLMO2, GPT2)
