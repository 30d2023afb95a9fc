"""Model families, looked up by Hugging Face's `model_type`."""

from __future__ import annotations

from homodistil.errors import UserError
from homodistil.models.decoders import DECODERS
from homodistil.models.encoders import ENCODERS
from homodistil.models.family import ModelFamily

_ALL = (*ENCODERS, *DECODERS)
FAMILIES: dict[str, ModelFamily] = {
    model_type: family for family in (*ENCODERS, *DECODERS) for model_type in family.model_types
}
"""`model_type` of a configuration -> its family."""


def family_of(model_type: str) -> ModelFamily:
    """The family of `config.model_type`. Raises `UserError` for an architecture that none describes."""
    if model_type not in FAMILIES:
        allowed = ", ".join(sorted(FAMILIES))
        raise UserError(
            f"teacher.name: architecture {model_type!r} is not supported; supported: {allowed}. "
            f"A new family is one file in homodistil/models/ (docs/add-a-family.md)"
        )
    return FAMILIES[model_type]
