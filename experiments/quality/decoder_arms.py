"""Methods of the decoder study, as overrides of the run config; a value that the config refuses is an arm to come.

Ours are all forms of one cut: selection, refit or a rotated and refitted residual stream, gradual or before step 0.
Peers are what their papers do, within this product: the same teacher, text, steps and evaluation.
"""

from __future__ import annotations

from experiments.quality import arms
from experiments.quality.arms import EARLY, ONE_SHOT, PINNED, RANDOM, Arm

DECODER_BASE = (
    "recipe=quickstart-decoder",
    *PINNED,
    "data.sources=[embedded:wikipedia]",
    "data.seq_len=64",
    "data.heldout_fraction=0.1",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.eval_batch_size=8",
    "pruning.end_fraction=0.3",
    "pruning.interval_steps=10",
    "pruning.max_event_fraction=0.25",
    "pruning.ffn_multiple=8",
    "pruning.compensation_sequences=128",
    "pruning.compensation_ridge=0.5",  # as selection, which fits nothing, was measured with
    "loss.kl=4",
    "loss.hidden=0",
    "loss.attention=0",
    "loss.embedding=0",
)

SIZES = ("0.7", "0.5")
"""Of the student, as a share of the teacher's parameters."""
_SMOLLM2_SHAPES = {"0.7": (480, 1280, 6, 3), "0.5": (384, 1024, 6, 3)}
"""Hidden size, neurons, heads, groups: 71 % and 50 % of all 30 layers, and stock shapes at any depth."""
_SIZE_FIELDS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
SMOLLM2 = "embedded:smollm2-135m"
"""The teacher unless another is given."""

CHOSEN_RIDGE = ("pruning.compensation_ridge=null",)
"""What decoders have by default."""
REFIT = ("pruning.compensation=refit", *CHOSEN_RIDGE)
FULL = (*arms.FULL, *CHOSEN_RIDGE)
ONLY_KL = ("loss.mlm=0", "loss.kl=1")
LAYERS_KL, LAYERS_REFIT, LAYERS_COPIED = "layers_kl", "layers_refit", "layers_copied"
BY_DEPTH = (LAYERS_KL, LAYERS_REFIT, LAYERS_COPIED)
"""The arms whose students have fewer layers instead of narrower ones."""
NARROW = "random_kl"
"""An arm that every version of the product has at the target widths."""
NO_CUT = ("pruning.schedule=none",)


def size_overrides(teacher: str, size: str) -> tuple[str, ...]:
    """The target of students that are narrower than their teacher."""
    widths = _SMOLLM2_SHAPES.get(size) if teacher == SMOLLM2 else None
    if widths is None:
        return ("student.preset=custom", f"student.size={size}", *(f"student.{name}=null" for name in _SIZE_FIELDS))
    return tuple(f"student.{name}={value}" for name, value in zip(_SIZE_FIELDS, widths, strict=True))


def depth_overrides(layers: list[int]) -> tuple[str, ...]:
    """The target of students that keep these layers of their teacher, ascending, at its width."""
    depth = (f"student.num_hidden_layers={len(layers)}", f"student.init_layers={layers}".replace(" ", ""))
    return ("student.preset=teacher", *(f"student.{name}=null" for name in _SIZE_FIELDS), *depth)


def _ours(name: str, label: str, *overrides: str) -> Arm:
    return Arm(name, label, overrides, is_ours=True, rate=3e-4)


DECODER_ARMS = {
    arm.name: arm
    for arm in (
        _ours("full_gradual", "ours, gradual, full", *FULL, *EARLY),
        _ours("full_one_shot", "ours, one-shot, full", *FULL, *ONE_SHOT),
        _ours("refit_gradual", "ours, gradual, refit", *REFIT, *EARLY),
        _ours("refit_one_shot", "ours, one-shot, refit", *REFIT, *ONE_SHOT),
        _ours("none_gradual", "ours, gradual, selection"),
        _ours("none_one_shot", "ours, one-shot, selection", *ONE_SHOT),
        Arm(
            "minitron",
            "Minitron: activations, one-shot, logits KL",
            (*ONE_SHOT, "pruning.importance=activation", *ONLY_KL),
            rate=3e-4,
            note="arXiv 2407.14679: width pruned by activation importance, distilled by the logits' KL alone",
        ),
        Arm(
            LAYERS_KL,
            "ShortGPT: layers dropped, + KL",
            (*NO_CUT, *ONLY_KL),
            rate=3e-4,
            note="arXiv 2403.03853: the layers of least block influence go; as many stay as come nearest to the "
            "parameters of the narrower students; then the logits' KL alone",
        ),
        _ours(LAYERS_REFIT, "ours: the same layers dropped, refitted", *NO_CUT, *REFIT),
        _ours(LAYERS_COPIED, "ours: the same layers dropped, as they were", *NO_CUT),
        Arm(NARROW, "random init, KL", (*RANDOM, *ONLY_KL), rate=1.2e-3),
        Arm(
            "slicegpt",
            "SliceGPT: closed-form cut, not trained",
            (*FULL, *ONE_SHOT),
            is_untrained=True,
            note="arXiv 2401.15024's idea in our form: rotate, slice and refit in closed form, all axes and not the "
            "residual stream alone; with distillation it is ours, one-shot, full",
        ),
    )
}
DEFAULT_ORDER = ("full_one_shot", "refit_one_shot", "none_gradual")
"""What the product does by default (pruning.compensation and schedule auto) is the first of these that it has."""
