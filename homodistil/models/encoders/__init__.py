"""Encoder families: one module per family. A new one is registered here."""

from __future__ import annotations

from homodistil.models.encoders.bert import BERT
from homodistil.models.encoders.distilbert import DISTILBERT
from homodistil.models.encoders.electra import ELECTRA
from homodistil.models.encoders.modernbert import MODERNBERT
from homodistil.models.encoders.mpnet import MPNET
from homodistil.models.encoders.roberta import ROBERTA
from homodistil.models.family import ModelFamily

ENCODERS: tuple[ModelFamily, ...] = (BERT, ROBERTA, DISTILBERT, ELECTRA, MPNET, MODERNBERT)
