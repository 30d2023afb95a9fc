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
NUM_LAYERS = 6
"""Of the packaged embedder."""


def layers_kept(num_layers: int) -> list[int]:
    """By the rival's rule, which of twelve keeps 1, 4, 7 and 10."""
    return list(range(1, num_layers, 3))


def embedder_arms(num_layers: int) -> dict[str, Arm]:
    """The methods by name, for a teacher of this many layers."""
    kept = layers_kept(num_layers)
    fewer_layers = (*depth_overrides(kept), "student.init_layers=[]", "student.layer_choice=influence")
    share = f"{len(kept)} of {num_layers} layers"
    arms = (
        Arm("ours", "ours: cut at once, compensated", (*ONE_SHOT, *FULL), is_ours=True, rate=1e-3),
        Arm("selection", "cut at once, selection, same loss", (*ONE_SHOT, *SELECTION), rate=2e-3),
        Arm("random_init", "random init, same loss", RANDOM, rate=2e-3),
        Arm(
            "layers",
            f"sentence-transformers: {share}, MSE",
            (*depth_overrides(kept), "pruning.schedule=none", *MSE_ALONE),
            own_shape=True,
            rate=5e-4,
            note=f"{len(kept)} layers at the teacher's width: another parameter count, for its word embeddings alone "
            "are more than the whole narrow student",
        ),
        Arm(
            "layers_refit",
            "the same layers, refitted, same loss",
            (*fewer_layers, "pruning.schedule=none", "pruning.compensation=refit"),
            own_shape=True,
            is_ours=True,
            rate=5e-4,
        ),
        Arm(
            "layers_copied",
            f"ours: {share} by block influence, as they were, same loss",
            (*fewer_layers, "pruning.schedule=none", *SELECTION),
            own_shape=True,
            is_ours=True,
            rate=1e-3,
            note="what an embedder that only loses layers has by default",
        ),
        Arm(
            "layers_refit_mse",
            "the same layers, refitted, MSE",
            (*fewer_layers, "pruning.schedule=none", "pruning.compensation=refit", *MSE_ALONE),
            own_shape=True,
            is_ours=True,
            rate=1e-3,
            note="what of our layers is the loss",
        ),
        Arm("ours_cut", "ours, cut alone", (*ONE_SHOT, *FULL), is_ours=True, is_untrained=True),
        Arm("selection_cut", "selection, cut alone", (*ONE_SHOT, *SELECTION), is_untrained=True),
    )
    return {arm.name: arm for arm in arms}


EMBEDDER_ARMS = embedder_arms(NUM_LAYERS)
DEFAULT = "ours"
