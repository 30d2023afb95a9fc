"""Model families: one file a family, looked up by Hugging Face's `model_type`."""

from __future__ import annotations

from types import ModuleType

from homodistil.errors import UserError
from homodistil.models.encoders import bert

FAMILIES: dict[str, ModuleType] = {bert.MODEL_TYPE: bert}


def family_of(model_type: str) -> ModuleType:
    """The family module for `config.model_type`. Raises `UserError` for an architecture without a table."""
    if model_type not in FAMILIES:
        allowed = ", ".join(sorted(FAMILIES))
        raise UserError(
            f"teacher.name: architecture {model_type!r} is not supported; supported: {allowed}. "
            f"A new family needs one table beside homodistil/models/encoders/bert.py"
        )
    return FAMILIES[model_type]
