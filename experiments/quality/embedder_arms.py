"""Methods of the study `embedder`: half of MiniLM-L6 as a sentence embedder, ours and what others do.

All learn the teacher's vectors of the same sentences. The first rival is the recipe of sentence-transformers
(its example `model_distillation_layer_reduction.py`): some of the teacher's layers at its width, and MSE.
"""

from __future__ import annotations

from experiments.quality.arms import FULL, ONE_SHOT, PINNED, RANDOM, Arm
from experiments.quality.decoder_arms import depth_overrides

EMBEDDER_BASE = (
    "recipe=quickstart-embedder",
    "student.num_attention_heads=6",  # the recipe's text and heads of before, with which all rows were measured
    "data.sources=[embedded]",
    *PINNED,
    "train.micro_batch_size=32",
    "pruning.calibration_batches=4",
    "pruning.compensation_sequences=512",
    "loss.mlm=0",
    "loss.kl=0",
    "loss.hidden=1",
    "loss.attention=0",
    "loss.embedding=0",
    "loss.pooled_cosine=10",
)
SELECTION = ("pruning.compensation=none",)
# The mean over 384 dims of squared differences of unit vectors: a gradient as large as that of 10 x cosine distance.
MSE_ALONE = ("loss.hidden=0", "loss.pooled_cosine=0", "loss.pooled_mse=1920")
LAYERS_KEPT = [1, 4]
"""Of six, as the example keeps 1, 4, 7 and 10 of twelve."""
_FEWER_LAYERS = (*depth_overrides(LAYERS_KEPT), "student.init_layers=[]", "student.layer_choice=influence")

EMBEDDER_ARMS = {
    arm.name: arm
    for arm in (
        Arm("ours", "ours: cut at once, compensated", (*ONE_SHOT, *FULL), is_ours=True, rate=1e-3),
        Arm("selection", "cut at once, selection, same loss", (*ONE_SHOT, *SELECTION), rate=2e-3),
        Arm("random_init", "random init, same loss", RANDOM, rate=2e-3),
        Arm(
            "layers",
            "sentence-transformers: 2 of 6 layers, MSE",
            (*depth_overrides(LAYERS_KEPT), "pruning.schedule=none", *MSE_ALONE),
            own_shape=True,
            rate=5e-4,
            note="two layers at the teacher's width: another parameter count, for its word embeddings alone are more "
            "than the whole narrow student",
        ),
        Arm(
            "layers_refit",
            "the same layers, refitted, same loss",
            (*_FEWER_LAYERS, "pruning.schedule=none", "pruning.compensation=refit"),
            own_shape=True,
            is_ours=True,
            rate=5e-4,
        ),
        Arm(
            "layers_copied",
            "ours: 2 of 6 layers by block influence, as they were, same loss",
            (*_FEWER_LAYERS, "pruning.schedule=none", *SELECTION),
            own_shape=True,
            is_ours=True,
            rate=1e-3,
            note="what an embedder that only loses layers has by default",
        ),
        Arm(
            "layers_refit_mse",
            "the same layers, refitted, MSE",
            (*_FEWER_LAYERS, "pruning.schedule=none", "pruning.compensation=refit", *MSE_ALONE),
            own_shape=True,
            is_ours=True,
            rate=1e-3,
            note="what of our layers is the loss",
        ),
        Arm("ours_cut", "ours, cut alone", (*ONE_SHOT, *FULL), is_ours=True, is_untrained=True),
        Arm("selection_cut", "selection, cut alone", (*ONE_SHOT, *SELECTION), is_untrained=True),
    )
}
DEFAULT = "ours"
