"""The interface of a loss term: a class that compares student and teacher, and counts its cost.

    class Gram(Term):
        names = ("gram",)
        needs = frozenset({"hidden"})
        def on_layer(self, i, student, teacher, step): ...    # a scalar; the sum over layers is loss/gram

    register(Gram)                                            # trained with loss.extra={gram: 0.5}

A forward pass of the student goes by four moments, and a term acts on those it wants: `on_embedding`, `on_layer`,
`on_last_layer` and `at_end`. Everything else about a term, its learned modules, checks, FLOPs and bytes, stands in its
class as well, so that nothing outside has to know which terms there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from homodistil.config.schema import LossConfig
from homodistil.data.batch import Batch
from homodistil.distill.layer_map import LayerMap
from homodistil.distill.teacher_outputs import TeacherOutputs
from homodistil.kernels.attention_map_inputs import MaskKind
from homodistil.models.activations import LayerActivations
from homodistil.models.architecture import BERT_LIKE, Architecture
from homodistil.models.axes import Widths, num_layers
from homodistil.models.family import ModelFamily

NEEDS = frozenset({"embedding", "hidden", "queries_keys", "values", "logits", "last"})
"""What a term may read: the input of layer 0, outputs of layers, queries and keys of layers, values of one layer, the
vocabulary head, and what the backbone puts out (the last layer's output, behind the final norm where there is one)."""


class StudentSide(Protocol):
    """What a term may ask of the student (distill/student.py)."""

    model: nn.Module
    family: ModelFamily
    projections: nn.ModuleDict
    """Learned modules of all terms, see `Term.module_name`."""
    layer_map: LayerMap
    softmax_scale: float

    def pruned_heads(self, i: int, device: torch.device) -> Tensor | None:
        """Teacher head of each head of layer `i`, int64 (heads,); None while all of them are there."""

    def lm_logits(self, rows: Tensor) -> Tensor:
        """(rows, D) of the last layer -> (rows, V)."""


class Step(NamedTuple):
    """One micro-batch, as terms see it."""

    student: StudentSide
    teacher: TeacherOutputs | None
    """None where no teacher runs: then `at_end` is the only moment, for terms of the student alone."""
    batch: Batch
    """With `counts` = means over all micro-batches of the step on all ranks: divide sums by these."""

    def mask_kind(self, i: int, teacher_layer: int | None = None) -> MaskKind:
        """Keys that queries of the student's layer `i` see, and those of the teacher's layer as well.

        A window of either, where texts are long enough for it to hide anything.

        Args:
            teacher_layer: None: the one that the student's layer is compared with.
        """
        layer = self.student.layer_map.layers[i] if teacher_layer is None else teacher_layer
        ours = self.student.family.mask_kind(self.student.model, i)
        theirs = self.teacher.family.mask_kind(self.teacher.model, layer)
        windows = [kind.window for kind in (ours, theirs) if kind.window is not None]
        kind = replace(ours, window=min(windows, default=None))
        unbounded = replace(kind, window=None)
        num_tokens = self.batch.input_ids.shape[1]
        return unbounded if kind.within(num_tokens) == unbounded.within(num_tokens) else kind


class Weighted(NamedTuple):
    """What a term of several names, or of the end of the forward pass, gives."""

    total: Tensor
    """Weighted sum, fp32 0-dim with a graph."""
    terms: dict[str, Tensor]
    """Name -> detached unweighted value, fp32 0-dim."""


class BatchSizes(NamedTuple):
    """What FLOPs and bytes depend on."""

    student: Widths
    """Axis -> current width; it may have fewer layers than the teacher."""
    teacher: Widths
    num_sequences: int
    seq_len: int
    """Tokens of a sequence, padding included."""
    target_rows: float
    """Rows to predict, over all sequences (an expected value)."""
    vocab_size: int
    student_bytes: int = 4
    """Bytes of an element of the student's activations."""
    teacher_bytes: int = 4
    architecture: Architecture = BERT_LIKE

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, padding included."""
        return self.num_sequences * self.seq_len

    @property
    def student_layers(self) -> range:
        return range(num_layers(self.student))


class Term:
    """Base of all terms: holds weights and options, never parameters. Every method but one moment may be left as it is.

    Args:
        loss: all options; `weights` are those of this term alone.
    """

    names: ClassVar[tuple[str, ...]]
    """Names of its weights in the config, and of its values in the log (`loss/NAME`). Nearly always one."""
    needs: frozenset[str] = frozenset()
    """Which of NEEDS it reads. Nothing else is computed, shown or kept on its account."""
    takes_stored: ClassVar[bool] = False
    """Whether all it asks of the teacher are `vectors` or `scores` of whole texts, which files may have
    (teacher.outputs=stored)."""
    module_prefix: ClassVar[str | None] = None
    """Before the moment, in names of learned modules; None: the term's name and an underscore."""

    def __init__(self, loss: LossConfig) -> None:
        self.loss = loss
        self.weights = {name: weight for name, weight in loss.weights.items() if name in self.names}

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def needs_teacher(self) -> bool:
        return True

    # -- what it compares

    def on_embedding(self, student: Tensor, teacher: Tensor, step: Step) -> Tensor | None:
        """Once a pass, what enters layer 0: (B, T, Ds) and (B, T, Dt). Called for terms that need "embedding".

        Returns:
            The term's value, fp32 0-dim: a sum divided by its `step.batch.counts`.
        """
        return None

    def on_layer(self, i: int, student: LayerActivations, teacher: LayerActivations, step: Step) -> Tensor | None:
        """Once for each layer `i` of the student, and the teacher's layer that it is compared with.

        Returns:
            That layer's part, fp32 0-dim. It is logged as `loss/NAME/layer.I`, and the term is the sum of its parts.
        """
        return None

    def on_last_layer(self, student: LayerActivations, teacher: LayerActivations, step: Step) -> Tensor | None:
        """Once a pass, behind the student's last layer.

        Args:
            student: with values for a term that needs "values".
            teacher: the teacher's last layer; for a term that needs "values" its layer loss.relation_layer, with them.

        Returns:
            The term's value, fp32 0-dim.
        """
        return None

    def at_end(self, last: Tensor, step: Step) -> Weighted | None:
        """Once a pass, when everything else has been compared. See `weighted`.

        Args:
            last: what the student's backbone puts out, (B, T, D).
            step: its teacher may be None. `step.teacher.logits` is for terms that need "logits", `take_last` for those
                that need "last".
        """
        return None

    def weighted(self, values: Mapping[str, Tensor]) -> Weighted:
        """`values` (name -> fp32 0-dim with a graph) under this term's weights. Names without a weight are left out."""
        values = {name: value for name, value in values.items() if name in self.weights}
        total = torch.stack([self.weights[name] * value for name, value in values.items()]).sum()
        return Weighted(total, {name: value.detach() for name, value in values.items()})

    # -- what it learns with the student

    def modules(self, layer_map: LayerMap, hidden_size: int) -> dict[str, nn.Module]:
        """Moment ("embedding", "layer_0", ..., "last", "end") -> a module that is trained along (losses/projection.py).

        It is called with (student, teacher, attention_mask), and where nothing is compared with (student, None, None);
        `student_dim` is the dimension of its only parameter, `weight`, that runs over the student's hidden size, and
        `after_resize(kept)` tells it which dims are left. One of "layer_3" leaves with that layer, and those behind it
        are renumbered with theirs.

        Args:
            hidden_size: of the student as it starts.
        """
        return {}

    def module_name(self, moment: str) -> str:
        prefix = f"{self.name}_" if self.module_prefix is None else self.module_prefix
        return prefix + moment

    def module(self, step: Step, moment: str) -> nn.Module:
        return step.student.projections[self.module_name(moment)]

    # -- what it asks for

    def check(self, teacher: Widths, student: Sequence[Widths]) -> None:
        """Raise `UserError` when the term cannot be taken between these.

        Args:
            student: its widths, first, on the way, and last; those on the way may leave out axes that have not changed.
        """
        return None

    # -- what it costs

    def flops(self, sizes: BatchSizes) -> float:
        """FLOPs of its own matrix products, forward and backward; a multiply-add is 2. Those of the head are
        `head_rows`."""
        return 0

    def head_rows(self, sizes: BatchSizes) -> tuple[float, float]:
        """Rows of (student, teacher) that it sends through the vocabulary head."""
        return 0, 0

    def saved_bytes(self, sizes: BatchSizes) -> float:
        """What it keeps from the student's forward pass until the backward pass begins, in addition to what the model
        saves."""
        return 0

    def logit_rows(self, sizes: BatchSizes) -> float:
        """Rows whose whole logits it keeps until then; `saved_bytes` has them too."""
        return 0


_REGISTERED: dict[str, type[Term]] = {}


def register(term: type[Term]) -> type[Term]:
    """Make a term known; usable as a decorator. The weights of its names then turn it on.

    Raises:
        ValueError: another class has one of its names, a name is no identifier, or it needs what there is not.
    """
    if unknown := set(term.needs) - NEEDS if isinstance(term.needs, frozenset) else set():
        raise ValueError(f"{term.__qualname__}.needs: {sorted(unknown)} unknown; allowed: {sorted(NEEDS)}")
    for name in term.names:
        if not name.isidentifier() or name == "total":
            raise ValueError(f"{term.__qualname__}.names: {name!r} is no name for a term; use letters, digits and _")
        known = _REGISTERED.get(name)
        if known is not None and _identity(known) != _identity(term):
            raise ValueError(f"{term.__qualname__}.names: {name!r} is taken by {'.'.join(_identity(known))}")
    _REGISTERED.update(dict.fromkeys(term.names, term))
    return term


def _identity(term: type[Term]) -> tuple[Any, ...]:
    """What identifies a class, also after its module has been imported again."""
    return term.__module__, term.__qualname__


def registered() -> dict[str, type[Term]]:
    """Name of a weight -> its term, in the order in which terms are compared."""
    return dict(_REGISTERED)
