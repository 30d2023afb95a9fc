"""What a config leaves to its teacher: the task, weights of terms that need logits, what the terms compare, and how
cuts are compensated."""

from __future__ import annotations

from collections.abc import Callable

from homodistil.config.rules import check_basis, check_schedule, check_task
from homodistil.config.schema import LM_HEAD_WEIGHTS, RunConfig, set_value
from homodistil.config.schema_loss import POOLED_WEIGHTS
from homodistil.data.task import settle_task, task_of
from homodistil.distill.losses.active import active_terms, field_of
from homodistil.distill.losses.settled import settled_fields
from homodistil.errors import UserError
from homodistil.metrics.term_labels import language_modelling
from homodistil.models import family_of
from homodistil.training.classifier import labels_task, learn_labels
from homodistil.training.embedder import is_embedder, settle_texts
from homodistil.training.length_choice import give_length
from homodistil.training.rate_choice import give_correction_rate
from homodistil.training.schedule_choice import compensation_of, give_ridge, give_sequences, schedule_of
from homodistil.training.stored_terms import check_stored
from homodistil.training.task_defaults import give_defaults, wants_head


def settle(config: RunConfig, teacher_config, has_head: bool = True, folder: str | None = None) -> None:
    """Replace what the config leaves to the teacher, in place: teacher.correction_lr, data.task, data.seq_len,
    data.short_steps, data.prompt, data.texts, loss.mlm, loss.kl, loss.pooled_cosine, loss.scores_kl, loss.scores_mse,
    loss.labels, loss.attention_target, loss.hidden_space, pruning.compensation, compensation_sequences,
    compensation_ridge and schedule.

    Args:
        has_head: whether the teacher has a language-modelling head that has been trained.
        folder: folder or hub name of the teacher, to be looked at for sentence modules; None: it is not.

    Raises:
        UserError: the config asks for what the teacher's family does not have.
    """
    family, pruning = family_of(teacher_config.model_type), config.pruning
    wants = wants_head(config)
    labels = labels_task(config, teacher_config)
    embeds = not (wants or labels) and is_embedder(config.data, family, folder)
    settle_task(config.data, family.task, config.teacher.name, has_head or wants, embeds, labels)
    give_length(config, teacher_config)
    give_correction_rate(config, family.shape(teacher_config).hidden_size, family.is_causal)
    settle_texts(config.data, folder)
    if task_of(config.data).has_vectors:
        give_defaults(config, POOLED_WEIGHTS)
    if task_of(config.data).has_labels:
        learn_labels(config, teacher_config)
    if not task_of(config.data).has_lm_head:
        _leave_out_words(config)
    for name, value in settled_fields(config.loss, family.architecture).items():
        set_value(config, f"loss.{name}", value)
    obstacle = family.refit_obstacle(teacher_config)
    if pruning.compensation == "auto":
        pruning.compensation = "none" if obstacle else compensation_of(config)
    if pruning.schedule == "auto":
        pruning.schedule = schedule_of(config)
        check_schedule(config)
    give_sequences(config)
    if family.is_causal:
        give_ridge(config)
    _check_settled_basis(config)
    check_stored(config)
    if pruning.compensation != "none" and pruning.schedule != "none" and obstacle:
        raise UserError(
            f"pruning.compensation: found {pruning.compensation}, allowed is none for this teacher, {obstacle}; set it "
            f"to none or auto"
        )


def _check_settled_basis(config: RunConfig) -> None:
    check_basis(config)  # compensation may have been left open until now
    task = task_of(config.data)
    if config.pruning.basis == "fisher" and task.head == "none" and not task.has_vectors:
        raise UserError(
            "pruning.basis: found fisher, which weighs directions by gradients of a language-modelling head, which "
            f"data.task={config.data.task} leaves out; allowed are auto, pca and learned; set it to auto"
        )


def _leave_out_words(config: RunConfig) -> None:
    """Weights of the terms over the vocabulary become 0; the user has set none (`rules.check`)."""
    for name in LM_HEAD_WEIGHTS:
        set_value(config, name, 0.0)
    readers = [field_of(config.loss, n) for t in active_terms(config.loss) if "logits" in t.needs for n in t.names]
    if readers:
        raise UserError(
            f"{readers[0]}: needs logits, but data.task={config.data.task} has no language-modelling head; set "
            f"{readers[0]}=0"
        )
    if not config.loss.weights:
        raise UserError(
            f"loss: every weight but those of terms over the vocabulary is 0, and data.task={config.data.task} has no "
            f"logits; give loss.hidden or loss.attention a weight > 0"
        )


def check_head(config: RunConfig, has_head: bool, say: Callable[[str], None]) -> None:
    """Refuse a head that nobody has trained where the config uses it."""
    name, steps = config.teacher.name, config.teacher.correction_steps
    head = f"{language_modelling(config.data.task)} head"
    if not task_of(config.data).has_lm_head:
        _tell_without_words(config, has_head, say)
        return
    if has_head:
        return
    if steps:
        say(f"teacher: {name} has no {head}; teacher.correction_steps={steps} trains one")
        return
    readers = [term for term in active_terms(config.loss) if "logits" in term.needs]
    if readers:
        fields = [field_of(config.loss, name) for term in readers for name in term.names]
        raise UserError(
            f"teacher.name: {name!r} has no {head}, so {' and '.join(fields)} would teach noise; "
            f"set teacher.correction_steps (1000, say) to train one, or {'=0 '.join(fields)}=0"
        )
    if config.pruning.compensation in ("project", "full") and config.pruning.schedule != "none":
        raise UserError(
            f"pruning.compensation: found {config.pruning.compensation}, but the teacher {name!r} has no trained "
            f"{head}, whose gradients choose the basis and whose loss checks it, so that it would do harm; set "
            f"pruning.compensation=refit or none, or teacher.correction_steps (1000, say) to train a head"
        )
    if config.pruning.importance == "teacher_kl":
        raise UserError(
            f"pruning.importance: found teacher_kl, but the teacher {name!r} has no trained {head} to sample labels "
            f"from; set pruning.importance=sensitivity, or teacher.correction_steps (1000, say) to train a head"
        )
    say(f"teacher: {name} has no {head}, and none is used (loss.mlm=0, loss.kl=0)")


def _tell_without_words(config: RunConfig, has_head: bool, say: Callable[[str], None]) -> None:
    """Raise `UserError` where something needs words all the same that was left open at first."""
    check_task(config)
    why = f"the language-modelling head of {config.teacher.name} is left out"
    if not has_head:
        why = f"{config.teacher.name} has no language-modelling head"
    say(
        f"teacher: {why}: task {config.data.task}, which masks and predicts nothing (loss.mlm=0, loss.kl=0); the "
        f"student learns from {', '.join(config.loss.weights)}"
    )
