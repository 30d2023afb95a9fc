"""The README.md of an exported checkpoint: what it is, where it came from, how good it is, how to load it."""

from __future__ import annotations

from collections.abc import Mapping

from homodistil import __version__
from homodistil.config import RunConfig
from homodistil.distill.objective import TERMS
from homodistil.models.axes import Widths

_TEMPLATE = """---
library_name: transformers
pipeline_tag: fill-mask
tags: [homodistil, distillation, pruning, bert]
---
# {name}

{parameters:,} parameters, hidden size {hidden_size}. Made from `{teacher}` with homodistil {version} (homotopic
distillation: Liang et al., HomoDistil, ICLR 2023): {how}.

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer
model = AutoModelForMaskedLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

| what | value |
|---|---|
{rows}

Text: {sources} ({data}).

Command: `{command}`
"""


def model_card(config: RunConfig, facts: Mapping[str, object], command: str) -> str:
    """Markdown.

    Args:
        facts: parameters, hidden_size, folder, data (the corpus in one line), and any value to list.
        command: the command line of the run.
    """
    loss = config.loss
    weights = ", ".join(f"{term} {getattr(loss, term):g}" for term in TERMS if getattr(loss, term))
    listed = {
        "steps": config.train.steps,
        "global batch": f"{config.train.global_batch_size} sequences of {config.data.seq_len} tokens",
        "peak learning rate": config.train.lr,
        "pruning": f"{config.pruning.schedule} until {config.pruning.end_fraction:g} of the steps, "
        f"importance {config.pruning.importance}",
        "loss weights": weights,
    } | {name: value for name, value in facts.items() if name not in ("parameters", "folder", "data")}
    return _TEMPLATE.format(
        name=config.run.name,
        parameters=facts["parameters"],
        hidden_size=facts["hidden_size"],
        folder=facts["folder"],
        teacher=config.teacher.name,
        version=__version__,
        how=_how(config),
        rows="\n".join(f"| {name} | {_text(value)} |" for name, value in listed.items()),
        sources=", ".join(config.data.sources),
        data=facts["data"],
        command=command,
    )


def _how(config: RunConfig) -> str:
    """What was done, in a few words."""
    if config.student.init == "random":
        return "the student starts with fresh weights at its final size and is trained on the teacher's outputs or text"
    if config.pruning.schedule == "none":
        return "the student starts with weights of the teacher and keeps its width"
    when = "at once" if config.pruning.schedule == "one_shot" else "while it is trained"
    return f"the student starts as the teacher, loses its least important neurons {when}, and learns to imitate it"


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def describe_widths(before: Widths, after: Widths) -> str:
    """`hidden 128 -> 64, feed-forward 512 -> 256, heads 2 x 64 -> 2 x 32` (of layer 0; all layers are alike)."""
    parts = [f"hidden {before['hidden']} -> {after['hidden']}"]
    parts += [f"feed-forward {before['layer.0.ffn']} -> {after['layer.0.ffn']}"]
    heads = [f"{widths['layer.0.heads']} x {widths['layer.0.qk_dim']}" for widths in (before, after)]
    return ", ".join([*parts, f"heads {heads[0]} -> {heads[1]}"])
