"""Encoder families: one module per family. A new one is registered here."""

from __future__ import annotations

from homodistil.models.encoders.bert import BERT
from homodistil.models.encoders.roberta import ROBERTA
from homodistil.models.family import ModelFamily

ENCODERS: tuple[ModelFamily, ...] = (BERT, ROBERTA)
