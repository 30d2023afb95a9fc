"""Model families, looked up by Hugging Face's `model_type`."""

from __future__ import annotations

from homodistil.errors import UserError
from homodistil.models.decoders import DECODERS
from homodistil.models.encoders import ENCODERS
from homodistil.models.family import ModelFamily

FAMILIES: dict[str, ModelFamily] = {
    model_type: family for family in (*ENCODERS, *DECODERS) for model_type in family.model_types
}
"""`model_type` of a configuration -> its family."""


_EXPERTS = "experts would have to be removed and the router with them; give a dense model"
_STATE_SPACE = "its state-space layers have no axes here; give a Transformer"
_LATENT = "its keys and values share a latent space that no axis describes; give one with plain or grouped heads"
_IMAGES = "it reads images, and only text is distilled; give its language model as a checkpoint of its own"
_CAPPED = "its scores and logits are capped, which losses in chunks do not compute; give a Gemma 3"
_RELATIVE = "its attention adds products with relative positions, which the attention term does not see; give a BERT"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "phimoe", "dbrx"), _EXPERTS),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "jamba", "zamba", "zamba2", "bamba", "lfm2"), _STATE_SPACE),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _LATENT),
    **dict.fromkeys(("llava", "qwen2_vl", "qwen2_5_vl", "mllama", "paligemma", "idefics3", "gemma3"), _IMAGES),
    "gemma2": _CAPPED,
    **dict.fromkeys(("deberta", "deberta-v2"), _RELATIVE),
}
"""`model_type` of architectures that are known and not supported -> what would be needed, and what to do."""


def family_of(model_type: str) -> ModelFamily:
    """The family of `config.model_type`. Raises `UserError` for an architecture that none describes."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in REFUSED:
        raise UserError(f"teacher.name: architecture {model_type!r} cannot be cut: {REFUSED[model_type]}")
    raise UserError(
        f"teacher.name: architecture {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}. "
        f"A new family is one file (docs/add-a-family.md), named in teacher.plugins"
    )


def register(family: ModelFamily) -> ModelFamily:
    """Add a family, which is returned; for modules that teacher.plugins names.

    Raises:
        UserError: one of its model types has a family already.
    """
    if taken := [name for name in family.model_types if FAMILIES.get(name, family) is not family]:
        raise UserError(
            f"teacher.plugins: the family {family.name!r} registers model_type {taken[0]!r}, which is the "
            f"{FAMILIES[taken[0]].name} family's; give a model_type that has none, and each file once"
        )
    FAMILIES.update(dict.fromkeys(family.model_types, family))
    return family
