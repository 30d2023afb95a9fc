"""RoBERTa (Liu et al. 2019) and the models of its class: XLM-R and CamemBERT.

BERT's layers. What differs: the head, whose activation is a function, and positions, which begin behind the id of the
padding token: of 514 position embeddings 512 are used.
"""

from __future__ import annotations

from homodistil.models.encoders.block_names import ROBERTA_CLASSIFIER, ROBERTA_HEAD
from homodistil.models.encoders.post_norm import PostNormEncoder

ROBERTA = PostNormEncoder(
    name="roberta",
    model_types=("roberta", "xlm-roberta", "camembert"),
    backbone_name="roberta",
    head_names=ROBERTA_HEAD,
    classifier_names=ROBERTA_CLASSIFIER,
    head_prefix="lm_head.",
    unused=(
        "roberta.pooler.",
        "roberta.embeddings.position_ids",
        "roberta.embeddings.token_type_ids",
        "lm_head.decoder.",  # tied, in files that store it all the same
    ),
    positions_start_behind_padding=True,
)
