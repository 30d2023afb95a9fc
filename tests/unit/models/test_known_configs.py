"""The sizes that plans take from here are those of the published checkpoints."""

from __future__ import annotations

import pytest
import torch

from homodistil.models import family_of
from homodistil.models.known_configs import known_config

# Parameters of the language model, tied ones once, as the model cards and safetensors headers have them.
PUBLISHED = {
    "bert-base-uncased": 109_514_298,
    "roberta-base": 124_697_433,
    "xlm-roberta-base": 278_295_186,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "Qwen/Qwen3-0.6B": 596_049_920,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_parameters_are_the_published_ones(name, parameters):
    config = known_config(name)
    with torch.device("meta"):
        model = family_of(config.model_type).empty_model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_others_are_looked_up_elsewhere():
    assert known_config("somebody/else") is None
