"""One small model of every registered architecture, and which of its parameters no axis names.

A model type without a case fails test_conformance: a family is registered together with what it has to pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import (
    BertConfig,
    CamembertConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)

from homodistil.models import family_of
from homodistil.models.activations import ATTENTION

VOCABULARY, TOKENS, LAYERS = 97, 17, 2
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 30,
    "intermediate_size": 44,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 5,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_ENCODER_CUTS = (
    {"hidden_size": 25},
    {"intermediate_size": 31},
    {"num_attention_heads": 3, "hidden_size": 18},
    {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 4},
)
_DECODER_CUTS = (
    {"hidden_size": 30},
    {"intermediate_size": 31},
    {"num_attention_heads": 4, "num_key_value_heads": 2},
    {"num_attention_heads": 3, "num_key_value_heads": 3},
    {"hidden_size": 20, "intermediate_size": 20, "num_attention_heads": 2},
)


class Case(NamedTuple):
    """A family member that has to conform."""

    make_config: Callable[[], PretrainedConfig]
    cuts: tuple[dict[str, int], ...]
    """Targets: every axis alone, and all together. Sizes that are left out stay the teacher's."""
    untouched: tuple[str, ...] = ()
    """Ends of the names of parameters that no axis runs over."""


def _encoder(kind: type[PretrainedConfig], **more: object) -> Case:
    return Case(lambda: kind(**_ENCODER | more), _ENCODER_CUTS, ("predictions.bias", "lm_head.bias"))


def _decoder(kind: type[PretrainedConfig], **more: object) -> Case:
    return Case(lambda: kind(**_DECODER | more), _DECODER_CUTS, ("q_norm.weight", "k_norm.weight"))


CASES: dict[str, Case] = {
    "bert": _encoder(BertConfig),
    "roberta": _encoder(RobertaConfig, pad_token_id=1),
    "xlm-roberta": _encoder(XLMRobertaConfig, pad_token_id=1),
    "camembert": _encoder(CamembertConfig, pad_token_id=1),
    "llama": _decoder(LlamaConfig, tie_word_embeddings=True),
    "mistral": _decoder(MistralConfig, sliding_window=None),
    "qwen2": _decoder(Qwen2Config),
    "qwen3": _decoder(Qwen3Config, tie_word_embeddings=True),
}
"""model_type -> its case."""


def make_model(model_type: str, attention: str = ATTENTION, seed: int = 0) -> torch.nn.Module:
    """With weights far from their initial ones, so that nothing is 0 or 1 by accident; in evaluation mode."""
    config = CASES[model_type].make_config()
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = family_of(model_type).empty_model(config)
    for name, parameter in model.named_parameters():
        is_gamma = "norm" in name.lower() and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(is_gamma), std=0.3)
    return model.eval()


def token_ids(num_sequences: int = 2, seed: int = 0) -> torch.Tensor:
    """int64 (B, T) without special ids."""
    return torch.randint(5, VOCABULARY, (num_sequences, TOKENS), generator=torch.Generator().manual_seed(seed))
