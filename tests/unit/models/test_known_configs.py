"""The sizes that plans take from here are those of the published checkpoints."""

from __future__ import annotations

import pytest
import torch

from homodistil.models import family_of
from homodistil.models.known_configs import known_config

# Parameters of the language model, tied ones once, as the model cards and safetensors headers have them.
PUBLISHED = {
    "bert-base-uncased": 109_514_298,
    "distilbert-base-uncased": 66_985_530,
    # Backbones of 13,548,800 and 33,576,960 with their poolers (66k), and the generator's head.
    "google/electra-small-generator": 13_546_682,
    "google/electra-base-generator": 33_740_602,
    # all-mpnet-base-v2 has 109,486,464: without its pooler (590,592), with the head.
    "microsoft/mpnet-base": 109_518_527,
    "roberta-base": 124_697_433,
    "xlm-roberta-base": 278_295_186,
    "answerdotai/ModernBERT-base": 149_655_232,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "gpt2": 124_439_808,
    "distilgpt2": 81_912_576,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    "Qwen/Qwen3-0.6B": 596_049_920,
}

# In millions, as papers and names have them.
PUBLISHED_MILLIONS = {
    "answerdotai/ModernBERT-large": 395,
    "jhu-clsp/ettin-encoder-17m": 17,
    "jhu-clsp/ettin-encoder-32m": 32,
    "jhu-clsp/ettin-encoder-68m": 68,
    "jhu-clsp/ettin-encoder-150m": 150,
}


def _num_parameters(name: str) -> int:
    config = known_config(name)
    with torch.device("meta"):
        model = family_of(config.model_type).empty_model(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_parameters_are_the_published_ones(name, parameters):
    assert _num_parameters(name) == parameters


@pytest.mark.parametrize(("name", "millions"), PUBLISHED_MILLIONS.items())
def test_parameters_are_about_the_published_ones(name, millions):
    assert _num_parameters(name) / 1e6 == pytest.approx(millions, abs=1)


def test_others_are_looked_up_elsewhere():
    assert known_config("somebody/else") is None
