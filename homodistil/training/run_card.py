"""The model card of a run: what its config says about an exported model, in words."""

from __future__ import annotations

from collections.abc import Mapping

from homodistil.config.schema import RunConfig
from homodistil.export.model_card import Method, model_card
from homodistil.export.provenance import Origin
from homodistil.metrics.term_labels import term_label
from homodistil.models.family import ModelFamily


def run_card(
    config: RunConfig, family: ModelFamily, facts: Mapping[str, object], command: str, num_ranks: int = 1
) -> str:
    """`model_card` of a model that this run exports."""
    method = Method(config.run.name, _how(config), _settings(config))
    return model_card(origin_of(config), method, family, facts, command, num_ranks)


def origin_of(config: RunConfig) -> Origin:
    """Teacher, text and folders of the run, as its config names them."""
    return Origin(config.teacher.name, config.data, config.run.dir)


def _settings(config: RunConfig) -> dict[str, object]:
    loss = config.loss
    return {
        "steps": config.train.steps,
        "global batch": f"{config.train.global_batch_size} sequences of {config.data.seq_len} tokens",
        "peak learning rate": config.train.lr,
        "pruning": f"{config.pruning.schedule} until {config.pruning.end_fraction:g} of the steps, "
        f"importance {config.pruning.importance}",
        "loss weights": ", ".join(f"{term_label(t, config.data.task)} {w:g}" for t, w in loss.weights.items()),
    }


def _how(config: RunConfig) -> str:
    """What was done, in a few words."""
    if config.student.init == "random":
        return "the student starts with fresh weights at its final size and is trained on the teacher's outputs or text"
    if config.pruning.schedule == "none":
        return "the student starts with weights of the teacher and keeps its width"
    when = "at once" if config.pruning.schedule == "one_shot" else "while it is trained"
    return f"the student starts as the teacher, loses its least important neurons {when}, and learns to imitate it"
