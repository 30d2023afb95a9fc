"""One small model of every registered architecture, and which of its parameters no axis names.

A model type without a case fails test_conformance: a family is registered together with what it has to pass.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    Olmo2Config,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    SmolLM3Config,
    XLMRobertaConfig,
)

from homodistil.data.batch import Batch, LossCounts
from homodistil.models import family_of
from homodistil.models.activations import attention_implementation

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
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 30,
    "n_inner": 44,
    "n_layer": LAYERS,
    "n_head": 5,
    "n_positions": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
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


# Heads keep their dims, and the hidden size is that of all heads. A query sees 4 keys on each side in layer 1.
_MODERNBERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "intermediate_size": 44,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 5,
    "max_position_embeddings": 40,
    "local_attention": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
_MODERNBERT_CUTS = (
    {"hidden_size": 24, "num_attention_heads": 3},
    {"intermediate_size": 31},
    {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2},
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


def _distilbert() -> DistilBertConfig:
    sizes = {"dim": 30, "hidden_dim": 44, "n_layers": LAYERS, "n_heads": 5, "max_position_embeddings": 40}
    return DistilBertConfig(vocab_size=VOCABULARY, dropout=0.0, attention_dropout=0.0, **sizes)


def _decoder(kind: type[PretrainedConfig], **more: object) -> Case:
    return Case(lambda: kind(**_DECODER | more), _DECODER_CUTS, ("q_norm.weight", "k_norm.weight"))


def modernbert(**more: object) -> Case:
    return Case(lambda: ModernBertConfig(**_MODERNBERT | more), _MODERNBERT_CUTS, ("decoder.bias",))


CASES: dict[str, Case] = {
    "bert": _encoder(BertConfig),
    "roberta": _encoder(RobertaConfig, pad_token_id=1),
    "xlm-roberta": _encoder(XLMRobertaConfig, pad_token_id=1),
    "camembert": _encoder(CamembertConfig, pad_token_id=1),
    "modernbert": modernbert(),
    "distilbert": Case(_distilbert, _ENCODER_CUTS, ("vocab_projector.bias",)),
    "electra": _encoder(ElectraConfig, embedding_size=22),
    "mpnet": _encoder(MPNetConfig),
    "llama": _decoder(LlamaConfig, tie_word_embeddings=True),
    "mistral": _decoder(MistralConfig, sliding_window=None),
    "qwen2": _decoder(Qwen2Config),
    "qwen3": _decoder(Qwen3Config, tie_word_embeddings=True),
    "gemma": _decoder(GemmaConfig),
    # One layer of each kind; a softmax scale that no head size has.
    "gemma3_text": _decoder(
        Gemma3TextConfig,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=24,
        query_pre_attn_scalar=6,
    ),
    "smollm3": _decoder(SmolLM3Config, tie_word_embeddings=True, no_rope_layers=[1, 0]),
    "ministral": _decoder(MinistralConfig, sliding_window=24, layer_types=["sliding_attention", "full_attention"]),
    "olmo2": Case(lambda: Olmo2Config(**_DECODER), _DECODER_CUTS),
    "gpt2": Case(lambda: GPT2Config(**_GPT2), _ENCODER_CUTS),
}
"""model_type -> its case."""


def make_config(model_type: str, layers: int | None = None) -> PretrainedConfig:
    """The case's configuration; of another number of `layers`, the kinds of the first ones take turns."""
    config = CASES[model_type].make_config()
    if layers is None:
        return config
    config.num_hidden_layers = layers
    for name in ("layer_types", "no_rope_layers"):
        if kinds := getattr(config, name, None):
            setattr(config, name, [kinds[i % LAYERS] for i in range(layers)])
    return config


def make_model(
    model_type: str, attention: str | None = None, seed: int = 0, layers: int | None = None
) -> torch.nn.Module:
    """With weights far from their initial ones, so that nothing is 0 or 1 by accident; in evaluation mode."""
    config = make_config(model_type, layers)
    family = family_of(model_type)
    config._attn_implementation = attention or attention_implementation(family)
    torch.manual_seed(seed)
    model = family.empty_model(config)
    for name, parameter in model.named_parameters():
        is_gamma = ("norm" in name.lower() or ".ln_" in name) and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(is_gamma), std=0.3)
    return model.eval()


def write_export(model_type: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A stock checkpoint with random weights, as many words as `tokenizer` has, and room for 126 tokens."""
    config = CASES[model_type].make_config()
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 128
    family_of(model_type).empty_model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def token_ids(num_sequences: int = 2, seed: int = 0) -> torch.Tensor:
    """int64 (B, T) without special ids."""
    return torch.randint(5, VOCABULARY, (num_sequences, TOKENS), generator=torch.Generator().manual_seed(seed))


def batch_of(ids: torch.Tensor) -> Batch:
    """Every third token is predicted; nothing is padding."""
    index = torch.arange(1, ids.numel(), 3)
    # The number of pairs scales a term: the same for all.
    pairs = float(ids.shape[0] * ids.shape[1] ** 2)
    counts = LossCounts(float(len(index)), float(ids.numel()), pairs, pairs)
    return Batch(ids, torch.ones_like(ids), index, ids.flatten()[index], torch.arange(ids.numel()), counts)
