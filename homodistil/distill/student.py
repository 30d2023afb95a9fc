"""The student as DeepSpeed trains it: Hugging Face's model, the modules that the terms learn, and the objective.

`forward` is the training forward (loss terms); `predict` the inference one. The module knows where each of its
entries came from in the teacher (`kept`), which is what a resize event narrows. Entries of an axis that has been mapped
(models/resize_plan.py) have no origin: there `kept` only says how many there are.

Every computation enters through a call of the module itself, also those outside of training: ZeRO-3 gathers parameters
in hooks on module calls, and fetches them ahead of need only while calls follow the order of the last training step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from homodistil.config.schema import LossConfig
from homodistil.data.batch import Batch
from homodistil.distill.layer_map import LayerMap, last_of_blocks
from homodistil.distill.losses.pooled import student_vectors
from homodistil.distill.losses.settled import settled
from homodistil.distill.objective import Comparison, LossTerms, Objective
from homodistil.distill.teacher import Teacher
from homodistil.distill.teacher_outputs import TeacherOutputs, wanted_rows
from homodistil.models import axes, family_of
from homodistil.models.activations import ActivationHooks, ActivationVisitor, show_values
from homodistil.models.axes import AxisTable, AxisUse, Keep
from homodistil.models.family import ModelFamily
from homodistil.models.parameter_shape import full_numel
from homodistil.models.sentence_head import SentenceHead


class Student(nn.Module):
    """A stock model with the modules that the terms learn, as the engine trains it.

    Args:
        model: masked LM with tapped attention.
        config: weights and options of the terms; what is auto becomes what suits the model (losses/settled.py).
        distil: False trains MLM alone (teacher correction): the terms' modules are not made.
        layer_map: the teacher's measures; None: `model` is a copy of the teacher, as it is.
    """

    def __init__(
        self, model: nn.Module, config: LossConfig, distil: bool = True, layer_map: LayerMap | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.family = family_of(model.config.model_type)
        self.objective = Objective(settled(config, self.family.architecture))
        self.layer_map = layer_map or _copied_from(model.config)
        self._passed: dict[tuple[str, str], str] = {}
        """(moment, term) -> name of the module that the term calls then."""
        self.projections = nn.ModuleDict(self._make_modules() if distil else {})
        self._initial_widths = self.family.axis_table(model).widths
        self.origins = axes.whole(self._initial_widths)
        self.layers = tuple(range(self.num_layers))
        """Where each layer was in `model` as it was made: layers that have left are absent."""
        self._taps = ActivationHooks(model, self.family)
        self._pruned_heads: dict[int, Tensor | None] = {}
        needs = self.objective.needs
        if "values" in needs:
            show_values(model, self.family, -1)
        # What no gradient reaches would only decay.
        if "logits" not in needs:
            for parameter in head_only_parameters(model, self.family):
                parameter.requires_grad_(False)
        self._freeze_unread()

    def _freeze_unread(self) -> None:
        """The parts of the last layer whose output no term reads."""
        if not self.objective.needs_last_layer:
            with_values = "values" not in self.objective.needs
            for module in self.family.output_modules(self.model, with_values=with_values):
                module.requires_grad_(False)

    def _make_modules(self) -> dict[str, nn.Module]:
        """What the terms learn along with the student, in their order."""
        made: dict[str, nn.Module] = {}
        for term in self.objective.terms:
            modules = term.modules(self.layer_map, self.model.config.hidden_size)
            made |= {term.module_name(moment): module for moment, module in modules.items()}
            self._passed |= {(moment, term.name): term.module_name(moment) for moment in modules}
        return made

    @property
    def num_layers(self) -> int:
        return len(self.family.layers(self.model))

    def axis_table(self) -> AxisTable:
        """The family's table under the name `model`, and the student's side of every projection."""
        extra = [
            AxisUse(f"projections.{name}.weight", projection.student_dim, ("hidden",), scored=False)
            for name, projection in self.projections.items()
        ]
        return self.family.axis_table(self.model).prefixed("model").with_uses(extra)

    @property
    def head_maps(self) -> list[Tensor]:
        """Per layer the teacher head of each student head, int64 (N_student,), on the CPU."""
        return [axes.head_origins(self.origins, self._initial_widths, i) for i in range(self.num_layers)]

    def pruned_heads(self, i: int, device: torch.device) -> Tensor | None:
        """The head map of layer `i` on `device`; None while it has all heads of the teacher's."""
        if i not in self._pruned_heads:
            heads = self.head_maps[i]
            self._pruned_heads[i] = heads.to(device) if len(heads) < self.layer_map.num_heads else None
        return self._pruned_heads[i]

    def forward(
        self,
        batch: Batch,
        targets: TeacherOutputs | None = None,
        objective: Objective | None = None,
        only_logits: bool = False,
        only_vectors: SentenceHead | None = None,
        only_scores: bool = False,
    ) -> LossTerms | Tensor:
        """The training forward: loss terms of one micro-batch. `targets` None: MLM alone.

        Args:
            objective: see `compare`; the trained one by default.
            only_logits: see `predict`.
            only_vectors: see `embed`.
            only_scores: see `scores`.
        """
        objective = objective or self.objective
        comparison = Comparison(objective, self, batch, None if only_logits else targets)
        last = self._taps.visit(batch.input_ids, batch.padding_mask, comparison, batch.token_types)
        if only_vectors is not None:
            return student_vectors(last, batch.attention_mask, self, only_vectors)
        if only_scores:
            return self.family.classifier(self.model).logits(last, batch)
        if only_logits:
            return self.lm_logits(wanted_rows(last, batch, "masked"))
        return comparison.finish(last)

    @contextlib.contextmanager
    def dropping_out(self) -> Iterator[None]:
        """Inside, the model's dropout acts. Everywhere else, in probes, evaluations and calibrations, there is none."""
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()

    def compare(self, batch: Batch, targets: TeacherOutputs | None, objective: Objective) -> LossTerms:
        """The terms of `objective`, which may differ from the one that is trained (see evaluation/gap_probe.py)."""
        return self(batch, targets, objective)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Logits (M, V) of the masked rows."""
        return self(batch, only_logits=True)

    @torch.no_grad()
    def embed(self, batch: Batch, head: SentenceHead) -> Tensor:
        """Vectors of the batch's texts, (B, E) fp32, not normalised. `head`: the teacher's."""
        return self(batch, only_vectors=head)

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """Logits of labels, fp32 (rows, labels), of the rows that the head reads. Of a classifier alone."""
        return self(batch, only_scores=True)

    @torch.no_grad()
    def show(self, batch: Batch, visitor: ActivationVisitor) -> None:
        """Show the backbone's forward pass to `visitor`. Not of a student that an engine holds."""
        self._taps.visit(batch.input_ids, batch.padding_mask, visitor, batch.token_types)

    @torch.no_grad()
    def lm_losses(self, batch: Batch, teacher: Teacher | None) -> tuple[Tensor, Tensor]:
        """Sums over the rows to predict of cross-entropy and of KL(teacher || student); of a causal model in chunks.

        Args:
            teacher: None: the second sum is 0.
        """
        rows = max(float(len(batch.target_ids)), 1.0)  # a rank may be left with a batch that predicts nothing
        batch = batch._replace(counts=batch.counts._replace(target_rows=rows))
        objective = self._only_vocabulary if teacher is not None else self._only_language
        terms = self(batch, teacher(batch) if teacher is not None else None, objective).terms
        return terms["mlm"] * rows, terms.get("kl", torch.zeros_like(terms["mlm"])) * rows

    @functools.cached_property
    def _only_vocabulary(self) -> Objective:
        return Objective(self.objective.config.only(mlm=1.0, kl=1.0))

    @functools.cached_property
    def _only_language(self) -> Objective:
        return Objective(self.objective.config.only(mlm=1.0))

    def pass_modules(self, moment: str, hidden: Tensor, compared: Collection[str]) -> None:
        """Keep to the order of module calls where only the terms named `compared` are measured (see above)."""
        for (called_at, term), name in self._passed.items():
            if called_at == moment and term not in compared:
                self.projections[name](hidden, None, None)

    def lm_logits(self, rows: Tensor) -> Tensor:
        """(rows, D) of the last layer -> (rows, V)."""
        return self.family.lm_head(self.model)(rows)

    def after_resize(self, keep: Keep) -> None:
        """Call once parameters have been sliced by `keep`: sizes that modules remember, origins, head maps."""
        before = {axis: index.shape[-1] for axis, index in self.origins.items()}
        widths = axes.widths_after(before, keep)
        self.origins = axes.compose(self.origins, keep, axes.outer_axes(before))
        self.family.refresh(self.model, widths)
        self.family.follow_origins(self.model, self.origins)
        self._pruned_heads.clear()
        for projection in self.projections.values():
            projection.after_resize(self.origins["hidden"])

    def layer_parameters(self, layers: Collection[int]) -> set[str]:
        """Names of all parameters that leave with these layers (current numbers): their own, and those of W."""
        leaving = {id(p) for i in layers for p in self.family.layers(self.model)[i].parameters()}
        moments = {_moment(i) for i in layers}
        names = (name for (moment, _), name in self._passed.items() if moment in moments)
        leaving |= {id(p) for name in names for p in self.projections[name].parameters()}
        return {name for name, parameter in self.named_parameters() if id(parameter) in leaving}

    def keep_layers(self, kept: Sequence[int]) -> None:
        """Let all layers go but `kept` (current numbers, ascending, with 0): they and all that is numbered by layers
        get new numbers. Each is then compared with the last teacher layer before the next one that stayed.

        Of a student that was made with all of the teacher's layers. In an engine: only inside `remove_parameters`, and
        only where a term reads the last layer's output.
        """
        num_teacher_layers = self.layer_map.layers[-1] + 1
        self._keep_modules(kept)
        self.family.keep_layers(self.model, kept)
        self._taps.number_layers(self.model)
        self.origins = axes.of_layers(self.origins, kept)
        self.layers = tuple(self.layers[i] for i in kept)
        self.layer_map = self.layer_map._replace(layers=last_of_blocks(self.layers, num_teacher_layers))
        self._pruned_heads.clear()
        if "values" in self.objective.needs:
            show_values(self.model, self.family, -1)
        self._freeze_unread()

    def _keep_modules(self, kept: Sequence[int]) -> None:
        """The terms' modules of the layers `kept`, by their new names, in the order in which they would be made."""
        terms = {term.name: term for term in self.objective.terms}
        renamed = {_moment(i): _moment(number) for number, i in enumerate(kept)}
        gone = {_moment(i) for i in range(self.num_layers) if i not in kept}
        passed, modules = {}, {}
        for (moment, term), name in self._passed.items():
            if moment not in gone:
                now = renamed.get(moment, moment)
                passed[now, term] = terms[term].module_name(now)
                modules[passed[now, term]] = self.projections[name]
        self.projections.clear()
        self.projections.update(modules)
        self._passed = passed

    @property
    def widths(self) -> dict[str, int]:
        """Axis -> current width."""
        return {axis: index.shape[-1] for axis, index in self.origins.items()}

    @property
    def softmax_scale(self) -> float:
        """What the softmax multiplies q.k with: that of the start, whatever the width of the heads now."""
        return self._taps.scale

    def num_parameters(self) -> int:
        """Parameters of the model that is exported (tied ones once, projections left out)."""
        return sum(full_numel(p) for p in self.model.parameters())


def _moment(layer: int) -> str:
    """The moment of a forward pass behind `layer`, by its name in `Term.modules`."""
    return f"layer_{layer}"


def _copied_from(config) -> LayerMap:
    """The counterpart of a copy of the whole teacher."""
    shape = family_of(config.model_type).shape(config)
    return LayerMap(shape.hidden_size, shape.num_attention_heads, tuple(range(shape.num_hidden_layers)))


def head_only_parameters(model: nn.Module, family: ModelFamily) -> list[nn.Parameter]:
    """Parameters of the MLM head that nothing else uses (the tied word embeddings are not among them); [] where there
    is none."""
    if not family.has_head(model):
        return []
    shared = {id(p) for p in family.backbone(model).parameters()}
    return [p for p in family.lm_head(model).parameters() if id(p) not in shared]
