"""The README.md of an exported checkpoint: what it is, where it came from, how good it is, how to load it."""

from __future__ import annotations

from collections.abc import Mapping

from homodistil import __version__
from homodistil.config import RunConfig

_TEMPLATE = """---
library_name: transformers
pipeline_tag: fill-mask
tags: [homodistil, distillation, pruning, bert]
---
# {name}

{parameters:,} parameters, hidden size {hidden_size}. Made from `{teacher}` with homodistil {version} (homotopic
distillation: Liang et al., HomoDistil, ICLR 2023): the student starts as the teacher and loses its least important
neurons while it is trained to imitate the teacher.

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer
model = AutoModelForMaskedLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

| what | value |
|---|---|
{rows}

Data: {data}

Command: `{command}`
"""


def model_card(config: RunConfig, facts: Mapping[str, object], command: str) -> str:
    """Markdown.

    Args:
        facts: parameters, hidden_size, folder, data, and any measured value to list.
        command: the command line of the run.
    """
    loss = config.loss
    weights = ", ".join(f"{term} {getattr(loss, term):g}" for term in ("mlm", "kl", "hidden", "attention", "embedding"))
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
        rows="\n".join(f"| {name} | {value} |" for name, value in listed.items()),
        data=facts["data"],
        command=command,
    )
