"""The README.md of an exported checkpoint: what it is, where it came from, how good it is, how to load it.

The block at its head is what the Hugging Face hub reads: licence and base model where they are known, data sets, and
the held-out results as a `model-index`. The teacher is measured after the student has been exported: its column of the
table is filled in then (`complete_cards`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import EvalResult, ModelCardData

from homodistil import __version__
from homodistil.config.schema import DataConfig
from homodistil.data.task import Task, task_of
from homodistil.export.provenance import Origin, Teacher, describe_sources, describe_teacher, hub_datasets, repeatable
from homodistil.files import write_atomically, writing
from homodistil.metrics.result_table import TASK_COLUMNS
from homodistil.models.axes import Widths, layer_widths
from homodistil.models.classifier import OF_TEXTS, OF_TOKENS
from homodistil.models.family import BACKBONE_CLASS, BACKBONE_TAG, ModelFamily

CARD_FILE = "README.md"
NOT_YET = "-"


class _Metric(NamedTuple):
    label: str
    hub_type: str
    form: str


# Column of the result table -> how the card tells it.
METRICS = {
    "heldout_mlm_loss": _Metric("held-out MLM loss, nats (lower is better)", "loss", "{:.4f}"),
    "masked_top1": _Metric("masked tokens guessed right (higher is better)", "accuracy", "{:.4f}"),
    "heldout_lm_loss": _Metric("held-out loss, nats a token (lower is better)", "loss", "{:.4f}"),
    "perplexity": _Metric("held-out perplexity (lower is better)", "perplexity", "{:.2f}"),
    "bits_per_byte": _Metric("held-out bits per byte (lower is better)", "bits_per_byte", "{:.4f}"),
    "kl_to_teacher": _Metric("KL to the teacher, nats (lower is better)", "kl_divergence", "{:.4f}"),
    "hidden_distance": _Metric("distance of hidden states (lower is better)", "loss", "{:.4g}"),
    "attention_distance": _Metric("distance of attention maps (lower is better)", "loss", "{:.4g}"),
    "embedding_distance": _Metric("distance of embeddings (lower is better)", "loss", "{:.4g}"),
    "cosine_to_teacher": _Metric("cosine to the teacher's vectors (higher is better)", "cosine_similarity", "{:.4f}"),
    "recall_at_10": _Metric("recall@10 of the teacher's nearest texts (higher is better)", "recall_at_10", "{:.4f}"),
    "label_agreement": _Metric("texts with the teacher's label (higher is better)", "accuracy", "{:.4f}"),
    "token_agreement": _Metric("tokens with the teacher's label (higher is better)", "accuracy", "{:.4f}"),
    "score_mse": _Metric("squared distance to the teacher's scores (lower is better)", "mse", "{:.4g}"),
    "score_pearson": _Metric("Pearson correlation with the teacher's scores (higher is better)", "pearsonr", "{:.4f}"),
    "score_spearman": _Metric("Spearman correlation with the teacher's scores", "spearmanr", "{:.4f}"),
    "label_accuracy": _Metric("accuracy (higher is better)", "accuracy", "{:.4f}"),
    "label_f1": _Metric("micro-averaged F1 (higher is better)", "f1", "{:.4f}"),
    "label_macro_f1": _Metric("F1 of tokens, mean over labels (higher is better)", "f1", "{:.4f}"),
    "label_entity_f1": _Metric("F1 of whole entities (higher is better)", "f1", "{:.4f}"),
    "label_mse": _Metric("squared distance to the labels (lower is better)", "mse", "{:.4g}"),
    "label_pearson": _Metric("Pearson correlation with the labels (higher is better)", "pearsonr", "{:.4f}"),
    "label_spearman": _Metric("Spearman correlation with the labels (higher is better)", "spearmanr", "{:.4f}"),
}

_TEMPLATE = """---
{metadata}
---
# {name}

{parameters:,} parameters, hidden size {hidden_size}. Made from `{teacher}` with homodistil {version} (homotopic
distillation: Liang et al., HomoDistil, ICLR 2023): {how}.

```python
{usage}
```
{note}
## Results

On documents that were held out of the training text, {masks}.

| | this model | teacher |
|---|--:|--:|
{metrics}

## How it was made

| what | value |
|---|---|
{rows}

Text: {sources} ({data}).

{licence}

The command, with {num_ranks}:

```
{command}
```
{placeholders}"""


_USAGE = """from transformers import {auto_class}, AutoTokenizer
model = {auto_class}.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""
_EMBEDDER_USAGE = """from sentence_transformers import SentenceTransformer
model = SentenceTransformer("{folder}")
vectors = model.encode(["A text.", "Another one."])"""
_EMBEDDER_TAG, _EMBEDDER_LIBRARY = "sentence-similarity", "sentence-transformers"

_WITHOUT_HEAD = """
An encoder without a head: `last_hidden_state` is what was trained. There is no pooler; a class that has one
(`BertModel`, for example) starts it with random weights, unless it is made with `add_pooling_layer=False`.
"""


class Method(NamedTuple):
    """How a model was made, in words."""

    name: str
    """`run.name`, which becomes the model's."""
    how: str
    """What was done, in half a sentence."""
    settings: Mapping[str, object]
    """What -> value, as the table of the card lists them first."""


def model_card(
    origin: Origin,
    method: Method,
    family: ModelFamily,
    facts: Mapping[str, object],
    command: str,
    num_ranks: int = 1,
) -> str:
    """Markdown with a YAML head. No path of this machine is in it.

    Args:
        family: of the exported model.
        facts: parameters, hidden_size, folder, data (the corpus in one line), columns of `METRICS`, and any value to
            list.
        command: the command line of the run.
    """
    teacher, task = describe_teacher(origin.teacher), task_of(origin.data, family.task)
    metrics = (*TASK_COLUMNS[task.name], *(["kl_to_teacher"] if task.head != "none" else []))
    if task.has_labels:  # which of them are measured depends on the teacher's labels
        metrics = tuple(name for name in metrics if name in facts)
    told, meant = repeatable(command, origin, num_ranks)
    not_listed = ("parameters", "folder", "data", *METRICS)
    listed = {**method.settings} | {name: value for name, value in facts.items() if name not in not_listed}
    return _TEMPLATE.format(
        metadata=_metadata(origin.data, method.name, family, facts, teacher),
        usage=_usage(task, family, str(facts["folder"])),
        note="" if task.head != "none" or task.has_vectors else _WITHOUT_HEAD,
        masks=_measured_how(task),
        name=method.name,
        parameters=facts["parameters"],
        hidden_size=facts["hidden_size"],
        teacher=teacher.name,
        version=__version__,
        how=method.how,
        metrics="\n".join(_metric_line(name, facts.get(name)) for name in metrics),
        rows="\n".join(f"| {name} | {_text(value)} |" for name, value in listed.items()),
        sources=", ".join(describe_sources(origin.data.sources)),
        data=facts["data"],
        licence=_licence(teacher),
        num_ranks="one rank" if num_ranks == 1 else f"{num_ranks} ranks",
        command=told,
        placeholders="".join(f"\nFor `{name}` put {meaning}.\n" for name, meaning in meant.items()),
    )


def complete_cards(run_dir: Path, teacher: Mapping[str, object]) -> None:
    """Put the teacher's results beside the student's in every card below `run_dir`.

    Args:
        teacher: its row of the result table.

    Raises:
        UserError: a card cannot be written.
    """
    run_dir = Path(run_dir)
    for card in sorted([*run_dir.glob("export/**/README.md"), *run_dir.glob("compare/*/export/README.md")]):
        with writing(card):
            before = card.read_text(encoding="utf-8")
            after = _with_teacher(before, teacher)
            if after != before:
                write_atomically(card, after)


def _with_teacher(card: str, teacher: Mapping[str, object]) -> str:
    for name, metric in METRICS.items():
        beginning, value = f"| {metric.label} |", teacher.get(name)
        if _is_number(value):
            lines = card.split("\n")
            lines = [_last_cell(x, metric.form.format(value)) if x.startswith(beginning) else x for x in lines]
            card = "\n".join(lines)
    return card


def _last_cell(line: str, value: str) -> str:
    """The table's line with another last cell."""
    return f"{line.rstrip(' |').rpartition('|')[0]}| {value} |"


def _usage(task: Task, family: ModelFamily, folder: str) -> str:
    if task.has_vectors:
        return _EMBEDDER_USAGE.format(folder=folder)
    return _USAGE.format(auto_class=_hub_names(task, family)[0], folder=folder)


def _hub_names(task: Task, family: ModelFamily) -> tuple[str, str]:
    """The class of transformers that loads the checkpoint, and its pipeline tag."""
    labels = OF_TOKENS if task.has_token_labels else OF_TEXTS
    names = {"lm": (family.auto_class, family.pipeline_tag), "classifier": (labels.auto_class, labels.pipeline_tag)}
    return names.get(task.head, (BACKBONE_CLASS, _EMBEDDER_TAG if task.has_vectors else BACKBONE_TAG))


def _measured_how(task: Task) -> str:
    if task.has_labels:
        return "against the teacher's logits, without labels"
    if task.has_vectors:
        return "of which each asks for its neighbours among all others"
    return "with masks that never change" if task.has_lm_head else "as terms of the training loss"


def _metric_line(name: str, value: object) -> str:
    metric = METRICS[name]
    shown = metric.form.format(value) if _is_number(value) else NOT_YET
    return f"| {metric.label} | {shown} | {NOT_YET} |"


def _metadata(text: DataConfig, name: str, family: ModelFamily, facts: Mapping[str, object], teacher: Teacher) -> str:
    """The head's YAML, as the hub's own client writes it."""
    task = task_of(text, family.task)
    pipeline_tag = _hub_names(task, family)[1]
    held_out = f"held-out documents of {', '.join(describe_sources(text.sources))}"
    results = [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type=(hub_datasets(text.sources) or ["text"])[0],
            dataset_name=held_out,
            metric_type=metric.hub_type,
            metric_name=metric.label,
            metric_value=float(facts[column]),
        )
        for column, metric in METRICS.items()
        if _is_number(facts.get(column))
    ]
    data = ModelCardData(
        library_name=_EMBEDDER_LIBRARY if task.has_vectors else "transformers",
        pipeline_tag=pipeline_tag,
        tags=["homodistil", "distillation", "pruning", family.name],
        license=teacher.licence,
        base_model=teacher.base_model,
        datasets=hub_datasets(text.sources) or None,
        model_name=name,
        eval_results=results or None,
    )
    return data.to_yaml()


def _licence(teacher: Teacher) -> str:
    if teacher.licence is None:
        return (
            f"Licence: that of `{teacher.name}` is not known here, so this card names none; look it up before you pass "
            f"this model on."
        )
    return f"Licence: `{teacher.name}`, which this model was made from, is under {teacher.licence}."


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def describe_widths(before: Widths, after: Widths) -> str:
    """`hidden 128 -> 64, feed-forward 512 -> 256, heads 2 x 64 -> 2 x 32` (of layer 0; all layers are alike)."""
    parts = [f"hidden {before['hidden']} -> {after['hidden']}"]
    old, new = (layer_widths(widths, 0) for widths in (before, after))
    parts += [f"feed-forward {old.intermediate_size} -> {new.intermediate_size}"]
    heads = [f"{layer.num_heads} x {layer.qk_dim}" for layer in (old, new)]
    return ", ".join([*parts, f"heads {heads[0]} -> {heads[1]}"])
