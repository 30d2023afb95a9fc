"""DistilBERT (Sanh et al. 2019): Hugging Face's `DistilBertForMaskedLM`.

BERT's layers without modules of their own for what adds to the residual stream, under other names; no token types.
"""

from __future__ import annotations

import torch

from homodistil.models.classifier import ClassifierNames
from homodistil.models.encoders.block_names import HeadNames, LayerNames, SizeNames
from homodistil.models.encoders.post_norm import PostNormEncoder

DISTILBERT = PostNormEncoder(
    name="distilbert",
    model_types=("distilbert",),
    backbone_name="distilbert",
    backbone_parts=("embeddings.", "transformer."),
    embedding_tables=("word_embeddings", "position_embeddings"),
    layers_name="transformer.layer",
    layer_names=LayerNames(
        attention="attention",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_linear="attention.out_lin",
        attention_norm="sa_layer_norm",
        ffn="ffn",
        ffn_linear="ffn.lin1",
        ffn_output_linear="ffn.lin2",
        ffn_norm="output_layer_norm",
    ),
    attention_name="attention",
    size_names=SizeNames("n_heads", "attention_head_size", "dim"),
    head_names=HeadNames(
        head=None,
        linear="vocab_transform",
        norm="vocab_layer_norm",
        decoder="vocab_projector",
        transform=None,
        activation="activation",
    ),
    classifier_names=ClassifierNames("pre_classifier", torch.relu, "classifier", "dropout"),
    head_prefix="vocab_",
    dropout_fields=("dropout", "attention_dropout"),
    config_names={
        "hidden_size": "dim",
        "intermediate_size": "hidden_dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "hidden_act": "activation",
    },
    unused=("distilbert.embeddings.position_ids",),
)
