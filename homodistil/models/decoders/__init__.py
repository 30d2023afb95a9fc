"""Decoder families: one module per family. A new one is registered here."""

from __future__ import annotations

from homodistil.models.decoders.llama import LLAMA
from homodistil.models.family import ModelFamily

DECODERS: tuple[ModelFamily, ...] = (LLAMA,)
