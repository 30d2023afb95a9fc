"""RoBERTa (Liu et al. 2019) and the models of its class: XLM-R and CamemBERT.

BERT's layers. What differs: the head, whose activation is a function, and positions, which begin behind the id of the
padding token: of 514 position embeddings 512 are used.
"""

from __future__ import annotations

from transformers.activations import gelu

from homodistil.models.encoders.post_norm import HeadNames, PostNormEncoder

ROBERTA = PostNormEncoder(
    name="roberta",
    model_types=("roberta", "xlm-roberta", "camembert"),
    backbone_name="roberta",
    head_names=HeadNames(
        head="lm_head",
        linear="lm_head.dense",
        norm="lm_head.layer_norm",
        decoder="lm_head.decoder",
        transform=None,
        activation=gelu,
    ),
    head_prefix="lm_head.",
    unused=(
        "roberta.pooler.",
        "roberta.embeddings.position_ids",
        "roberta.embeddings.token_type_ids",
        "lm_head.decoder.",  # tied, in files that store it all the same
    ),
    positions_start_behind_padding=True,
)
