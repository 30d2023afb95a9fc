"""Writes docs/families.md, the table of supported architectures, from the registry.

python docs/generate_families.py             # writes docs/families.md
python docs/generate_families.py --check     # exit code 1 if docs/families.md is stale
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from homodistil.models import FAMILIES, REFUSED
from homodistil.models.compensable import Compensable
from homodistil.models.family import ModelFamily

PAGE = Path(__file__).with_name("families.md")
_HEAD = """# Model families

<!-- Written by docs/generate_families.py; do not edit. -->

What can be made smaller, by `model_type` in a checkpoint's config.json. Every architecture here passes the tests in
`tests/families`: a copy is the teacher exactly, a cut student equals its stock export, no position sees what its mask
hides, FLOPs are those that torch counts. How to add one: [Add a model family](add-a-family.md).

| family | model types | task | what shrinks | compensation | evaluation |
|---|---|---|---|---|---|
"""
_ALL_AXES = "hidden size, neurons, heads, dims of heads"
_SHARED_HEADS = "hidden size, neurons, the same heads in all layers, dims of heads"
_GROUPED = "hidden size, neurons, key/value heads, equally many query heads in each group; rotary heads keep their dims"
_PAIRS = f"{_GROUPED.rpartition(';')[0]}; pairs of rotary dims (`student.head_dim`)"
_WHOLE_HEADS = "neurons, heads, and as much of the hidden size as they make up; rotary heads keep their dims"
_SCORES = {
    "mlm": "masked loss and top-1, without a head distances to the teacher; `homodistil glue`, `homodistil squad`",
    "causal": "held-out loss, perplexity, bits per byte; `homodistil lm-eval`",
}
_TASKS = {
    "mlm": "masked tokens (`mlm`); without a head: nothing (`none`); vectors of texts (`embedding`); logits of labels "
    "(`scores`)",
    "causal": "next token (`causal`)",
}
_ENGINES = """
Engines are the same for all: ZeRO stages 0 to 3, fp32 and bf16 (fp16 on a GPU), see [Engines](engines.md).

## Refused by name

| model types | why, and what to do |
|---|---|
"""


def page() -> str:
    """The whole page."""
    families = {id(family): family for family in FAMILIES.values()}.values()
    rows = [_row(family) for family in families]
    reasons = itertools.groupby(sorted(REFUSED.items(), key=lambda pair: pair[1]), key=lambda pair: pair[1])
    refused = [f"| {', '.join(f'`{name}`' for name, _ in group)} | {reason} |" for reason, group in reasons]
    return _HEAD + "\n".join(rows) + "\n" + _ENGINES + "\n".join(refused) + "\n"


def _axes(family: ModelFamily) -> str:
    if family.whole_heads:
        return _WHOLE_HEADS
    if family.architecture.has_position_bias:
        return _SHARED_HEADS
    if not family.architecture.has_rotary_positions:
        return _ALL_AXES
    return _PAIRS if family.narrows_heads else _GROUPED


def _row(family: ModelFamily) -> str:
    cells = [
        family.name,
        ", ".join(f"`{name}`" for name in family.model_types),
        _TASKS[family.task],
        _axes(family),
        _compensation(family),
        _SCORES[family.task],
    ]
    return f"| {' | '.join(cells)} |"


def _compensation(family: ModelFamily) -> str:
    condition = family.refit_condition if isinstance(family, Compensable) else None
    return "`none`" if condition is None else f"`none`, `refit`, `full` {condition}".strip()


def main() -> int:
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
