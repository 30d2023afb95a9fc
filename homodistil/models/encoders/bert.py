"""BERT (Devlin et al. 2018): Hugging Face's `BertForMaskedLM`."""

from __future__ import annotations

from homodistil.models.classifier import ClassifierNames
from homodistil.models.encoders.block_names import HeadNames
from homodistil.models.encoders.post_norm import PostNormEncoder

BERT = PostNormEncoder(
    name="bert",
    model_types=("bert",),
    backbone_name="bert",
    head_names=HeadNames(
        head="cls",
        linear="cls.predictions.transform.dense",
        norm="cls.predictions.transform.LayerNorm",
        decoder="cls.predictions.decoder",
        transform="cls.predictions.transform",
        activation="cls.predictions.transform.transform_act_fn",
    ),
    classifier_names=ClassifierNames("bert.pooler.dense", "bert.pooler.activation", "classifier", "dropout"),
    head_prefix="cls.predictions.",
    # Of BERT's own pretraining, and what older checkpoints kept beside the parameters.
    unused=(
        "bert.pooler.",
        "cls.seq_relationship.",
        "bert.embeddings.position_ids",
        "bert.embeddings.token_type_ids",
    ),
)
