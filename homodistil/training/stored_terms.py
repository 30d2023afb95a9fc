"""What a run with teacher.outputs=stored may ask for: nothing but what the teacher says of whole texts."""

from __future__ import annotations

from homodistil.config.schema import RunConfig
from homodistil.data.task import task_of
from homodistil.distill.losses.active import active_terms, field_of
from homodistil.errors import UserError


def check_stored(config: RunConfig) -> None:
    """Raise `UserError` where a config with stored outputs needs the teacher itself. Its task is settled."""
    if config.teacher.is_stored:
        check_single_texts(config)
        _check_terms(config)
        _check_teacher(config)


def check_single_texts(config: RunConfig) -> None:
    """Raise `UserError` where blocks hold no single texts. The task is settled."""
    if not task_of(config.data).has_single_texts:
        raise UserError(
            f"teacher.outputs: found stored, allowed with data.task={config.data.task} is live, as its blocks hold no "
            f"single texts, of which vectors or scores could be kept; set teacher.outputs=live"
        )
    if task_of(config.data).has_token_labels:
        raise UserError(
            f"teacher.outputs: found stored, allowed with data.task={config.data.task} is live, as files would "
            f"have to hold a state of every token; set teacher.outputs=live"
        )


def _check_teacher(config: RunConfig) -> None:
    for name in ("shard", "own_stream"):
        if getattr(config.teacher, name):
            raise UserError(
                f"teacher.{name}: found true, allowed with teacher.outputs=stored is false, as no teacher runs beside "
                f"the student; set teacher.{name}=false, or teacher.outputs=live"
            )


def _check_terms(config: RunConfig) -> None:
    terms = [term for term in active_terms(config.loss) if term.needs_teacher and not term.takes_stored]
    fields = [field_of(config.loss, name) for term in terms for name in term.weights]
    if fields:
        raise UserError(
            f"{fields[0]}: found {config.loss.weights[terms[0].name]:g}, but with teacher.outputs=stored losses may "
            f"ask for the teacher's vectors or scores of whole texts alone; set {'=0 '.join(fields)}=0, or "
            f"teacher.outputs=live"
        )
