"""Pruning events of a run: decides which neurons go, compensates for them, and applies the change.

The decisions are pruning/'s, the mathematics pruning/compensation's, the moving resize/'s; here they get what only a
run has: its text, its teacher and its probe. An event is the same for every `Shrinkable`: `Shrinker.shrink`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import fmean

import torch

from homodistil.data.batch import Batch
from homodistil.data.prefetch import BatchPrefetcher
from homodistil.distill.snapshot import StudentSnapshots
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.distributed import ranks
from homodistil.engine.engine import TrainingEngine
from homodistil.evaluation.gap_probe import GapProbe
from homodistil.metrics.recorder import Recorder
from homodistil.models.axes import Keep, Widths, expand_to_teacher
from homodistil.models.parameter_shape import full_shape
from homodistil.models.resize_plan import ResizePlan, make_plan
from homodistil.models.rotary_pairs import kept_pairs
from homodistil.pruning.activation_scores import activation_scores
from homodistil.pruning.calibration import calibrate
from homodistil.pruning.compensation.student import EventChange
from homodistil.pruning.importance import Importance
from homodistil.pruning.protected_dims import protected_dims, variance_shares
from homodistil.pruning.pruner import Pruner
from homodistil.pruning.schedule import stage_widths
from homodistil.training.compensated_events import Compensation
from homodistil.training.depth_events import choose_layers, depth_event, describe
from homodistil.training.gradient_scores import (
    measure_importance,
    score_by_drawn_directions,
    score_by_drawn_labels,
)
from homodistil.training.inputs import RunInputs
from homodistil.training.resize_events import resize_event
from homodistil.training.resolve import ResolvedRun
from homodistil.training.shrinkable import PlainStudent, Shrinkable
from homodistil.training.step_logger import require_finite
from homodistil.training.train_state import TrainState
from homodistil.training.trial_cuts import TrialCuts


class Shrinker:
    """How the student of one run becomes small.

    Args:
        student: at its initial widths, not yet in an engine.
        gap: of that student and `teacher`.
        heldout_loss: plain student -> held-out MLM loss (nats), the same on every rank.
        dtype: what the student computes in once an engine holds it.
    """

    def __init__(
        self,
        resolved: ResolvedRun,
        run_inputs: RunInputs,
        student: Student,
        teacher: Teacher,
        gap: GapProbe,
        heldout_loss: Callable[[Student], float],
        dtype: torch.dtype,
    ) -> None:
        self.config = config = resolved.config
        self.run_inputs, self.student, self.teacher, self.gap = run_inputs, student, teacher, gap
        self._heldout_loss, self._initial_widths, self._dtype = heldout_loss, student.widths, dtype
        self.pruner, self.depth = self._build_pruner(resolved), resolved.depth
        cuts = config.pruning.schedule != "none" or bool(self.depth.table)
        compensates = cuts and config.pruning.compensation != "none"
        self.compensation = Compensation(config, run_inputs, resolved.teacher_widths["hidden"]) if compensates else None

    def _build_pruner(self, resolved: ResolvedRun) -> Pruner:
        config, schedule, target = self.config, resolved.make_schedule(), resolved.target
        importance = Importance(
            self.student.axis_table(), config.pruning, config.train.seed, device=self.run_inputs.device
        )
        shares = ranks.mean(variance_shares(self.student.model, self.student.family, self.gap.batches))
        narrows = target["hidden"] < self._initial_widths["hidden"]
        protected = protected_dims(shares, config.pruning.protect_outliers if narrows else 0.0, target["hidden"])
        if len(protected) and ranks.rank() == 0:
            dims = ", ".join(f"{int(i)} ({float(shares[i]):.0%})" for i in protected)
            print(f"protected residual dims (share of the variance at a LayerNorm): {dims}", flush=True)
        return Pruner(schedule, importance, protected)

    # -- the event

    def shrink(self, target: Shrinkable, keep: Keep, done: TrainState, recorder: Recorder) -> None:
        """One event: what goes is cut out, what stays makes up for it, everything numbered by neurons follows.

        Args:
            target: the student of this run, live or plain.
            keep: what stays of the axes that are cut.
            done: the updates before the event, 0 before training.
        """
        before = self._measure(done)
        change = self._prepare(target.snapshot() if self.compensation else target.student, keep, done)
        moved = self._cut(target, change.plan)
        refit = self._refit(target, change)
        # 0 steps where milestones do not cool down (a bool as a factor).
        cool_down_steps = self.pruner.settle_steps(change.plan.widths_after) * self.config.run.settle_cooldown
        settled = target.settle(cool_down_steps, self.rate_share)
        after = self._measure(done)
        distance = self.gap.distance
        outcome = self.pruner.after_event(done.step, before[distance], after[distance])
        recorder.log_event(resize_event(done.step, change.plan, before, after) | outcome | refit | settled | moved)

    def _measure(self, done: TrainState) -> dict[str, float]:
        """The gap to the teacher. Raises `CheckFailed` when it is not finite."""
        gap = self.gap.measure()
        require_finite(gap, done.step, self.config)
        return gap

    def _prepare(self, student: Student, keep: Keep, done: TrainState) -> EventChange:
        """The event that leaves `keep` of `student`, which is not changed: plain, if the event is compensated."""
        if self.compensation is None:
            return EventChange(make_plan(student.axis_table(), keep))
        return self.compensation.propose(student, keep, done.consumed_samples, self.pruner.fixed)

    def _cut(self, target: Shrinkable, plan: ResizePlan) -> dict[str, float]:
        moved = target.resize(plan)
        self.pruner.after_resize(plan)
        return moved

    def _refit(self, target: Shrinkable, change: EventChange) -> dict[str, float]:
        """Give the target, which has been cut, its refitted weights. Returns entries of the event's line."""
        if not change.weights:
            return {}
        after_cut = {f"{self.gap.distance}_after_cut": self.gap.measure()[self.gap.distance]}
        written = target.write(change.weights)
        return change.report | after_cut | written

    def layers_due(self, done: TrainState) -> int | None:
        """How many layers are to be left after the update just applied; None, nearly always: no layer leaves."""
        return self.depth.due(done.step, self.student.num_layers)

    def remove_layers(
        self, target: Shrinkable, prefetcher: BatchPrefetcher, done: TrainState, recorder: Recorder
    ) -> None:
        """The event in which layers leave as a whole, until as many stay as `layers_due` says."""
        before, layers, widths = self._measure(done), self.student.layers, self.student.widths
        batches = (batch for step in self._calibration_steps(prefetcher, done.step) for batch in step)
        student = target.snapshot()
        choice = choose_layers(student, batches, self.depth, self.layers_due(done))
        change = self._prepare_layers(student, choice.kept, done)
        moved = self._keep_layers(target, choice.kept)
        refit = self._refit(target, change)
        settled = target.settle(0, self.rate_share)
        after = self._measure(done)
        event = depth_event(done.step, choice, layers, (widths, self.student.widths), (before, after))
        if ranks.rank() == 0:
            print(describe(event), flush=True)
        recorder.log_event(event | refit | settled | moved)

    def _prepare_layers(self, student: Student, kept: list[int], done: TrainState) -> EventChange:
        """The event after which `student`, which is not changed, has the layers `kept` left."""
        if self.compensation is None:
            return EventChange(make_plan(student.axis_table(), {}))
        return self.compensation.propose_layers(student, kept, done.consumed_samples)

    def _keep_layers(self, target: Shrinkable, kept: list[int]) -> dict[str, float]:
        moved = target.keep_layers(kept)
        self.pruner.keep_layers(kept)
        return moved

    @property
    def rate_share(self) -> float:
        """Factor on the learning rate at the present widths: `train.uncut_lr_share` before the cut, 1 after it."""
        initial, widths, target = self._initial_widths, self.student.widths, self.pruner.schedule.target
        cut = [axis for axis in widths if target[axis] < initial[axis]]
        progress = [(initial[a] - widths[a]) / (initial[a] - target[a]) for a in cut]
        share = self.config.train.uncut_lr_share
        return share + (1 - share) * fmean(progress) if progress else 1.0

    # -- before training: resume, and the one_shot schedule before step 0

    def restore(self, state: dict) -> None:
        """Cut the fresh student to the layers and widths of a checkpoint's `state`; the engine's values are loaded
        later."""
        layers = self.depth.layers_left(state.get("layers", self.student.layers))  # checkpoints of before have none
        if len(layers) < len(self.student.layers):
            self._keep_layers(PlainStudent(self.student), [self.student.layers.index(layer) for layer in layers])
        keep = expand_to_teacher(state["kept"], self._initial_widths)
        self._cut(PlainStudent(self.student), make_plan(self.student.axis_table(), keep))
        self.pruner.load_state_dict(state["pruner"])

    def before_training(self, recorder: Recorder) -> None:
        """Layers that leave now; check that compensation may do what it is asked to; then what one_shot cuts, in its
        stages."""
        target, done = PlainStudent(self.student), TrainState()
        if self.layers_due(done) is not None:
            self.remove_layers(target, self.run_inputs.prefetcher(self.config, self.config.train.seed), done, recorder)
        self._check_rotation()
        due = self.pruner.schedule.table.get(0, {})
        for widths in stage_widths(self.student.widths, due, self.config.pruning.one_shot_stages):
            self._calibrate(target)
            origins = self.student.origins
            keep = self.pruner.keep_of(widths, origins["hidden"], kept_pairs(origins))
            self.shrink(target, keep, done, recorder)

    def _check_rotation(self) -> None:
        """compensation=full and project: which residual dims must stay coordinates. A checkpoint remembers them."""
        narrows = self.pruner.schedule.target["hidden"] < self.student.widths["hidden"]
        if self.compensation and self.config.pruning.compensation in ("project", "full") and narrows:
            fixed = self.compensation.allowed_fixed_dims(self.student, self.pruner.protected, self._heldout_loss)
            self.pruner.may_rotate = fixed is not None
            if fixed is not None:
                self.pruner.protected = fixed

    def _calibrate(self, target: PlainStudent) -> None:
        """Importance from a few batches of the same data and losses, without an update."""
        prefetcher = self.run_inputs.prefetcher(self.config, self.config.train.seed)
        if self._score_apart(target, prefetcher, 0):
            return
        steps, table = self._calibration_steps(prefetcher, 0), self.student.axis_table()
        calibrate(self.pruner.importance, self.student, table, steps, lambda b: self.student(b, self.teacher(b)).total)

    # -- in training

    def snapshots(self) -> StudentSnapshots | None:
        """What `LiveStudent.snapshot` needs, to be made before an engine takes the student; None where nothing asks."""
        tries_cuts = self.config.pruning.schedule == "gap"
        is_asked = tries_cuts or self.compensation or not self.pruner.importance.uses_training or self._is_copy()
        is_asked = is_asked or any(self.depth.table)  # layers leave live
        return StudentSnapshots(self.student) if is_asked else None

    def measure(self, engine: TrainingEngine, step: int) -> Keep | None:
        """Importance sums of update `step`, by axis; None where they decide nothing any more. Every rank calls it.

        Between `accumulate` of the last micro-batch and `update`: only there are gradients reduced and unclipped.
        """
        if not self.pruner.wants_gradients(step):
            return None
        shapes = {name: full_shape(p) for name, p in self.student.named_parameters()}
        return measure_importance(engine, self.pruner.importance, self.student.axis_table(), shapes)

    def accept(self, scores: Keep | None) -> None:
        """Add what `measure` returned to the average, once the update has been applied: an fp16 overflow has no
        meaning."""
        if scores is not None:
            self.pruner.accept(scores)

    def due(self, target: Shrinkable, prefetcher: BatchPrefetcher, done: TrainState) -> Keep | None:
        """What stays after the event behind the update just applied; None, nearly always: there is no event."""
        if not self.pruner.is_due(done.step, self.student.widths):
            return None
        self._score_apart(target, prefetcher, done.step)
        kept_hidden, pairs = self.student.origins["hidden"], kept_pairs(self.student.origins)

        def prepare(student: Student, due: Widths) -> EventChange:
            return self._prepare(student, self.pruner.keep_of(due, kept_hidden, pairs), done)

        trials = TrialCuts(self.gap, target, prepare, self._dtype)
        return self.pruner.due(done.step, self.student.widths, kept_hidden, trials, pairs)

    def _score_apart(self, target: Shrinkable, prefetcher: BatchPrefetcher, step: int) -> bool:
        """Importance that training does not give, from the text that is trained on after `step` updates. Returns
        whether there was any to measure."""
        importance, seed = self.pruner.importance, (self.config.train.seed, step)
        steps = self._calibration_steps(prefetcher, step)
        if self.config.pruning.importance == "activation":
            importance.accept(activation_scores(target.snapshot(), steps))
        elif self.config.pruning.importance == "teacher_kl":
            score_by_drawn_labels(importance, target.snapshot(), self.teacher, steps, seed)
        elif self._is_copy():
            readout = self.run_inputs.pooling, self.run_inputs.logits
            score_by_drawn_directions(importance, target.snapshot(), steps, seed, *readout)
        else:
            return False
        return True

    def _is_copy(self) -> bool:
        """Whether the student is still the teacher and has no head: then every term and every gradient is 0."""
        family, student = self.student.family, self.student
        is_whole = student.widths == family.axis_table(self.teacher.model).widths
        return not self.run_inputs.with_head and self.config.student.init == "teacher" and is_whole

    def _calibration_steps(self, prefetcher: BatchPrefetcher, step: int) -> Iterator[list[Batch]]:
        """What is trained on after `step` updates."""
        batch_size, num_batches = self.config.train.global_batch_size, self.config.pruning.calibration_batches
        return (prefetcher.micro_batches((step + i) * batch_size) for i in range(num_batches))

    # -- results

    def summary(self) -> dict[str, object]:
        """What the schedule adds to the row of the result table; reported on rank 0, too."""
        report = self.pruner.schedule.report()
        if report and ranks.rank() == 0:
            print(report, flush=True)
        return self.pruner.schedule.summary()
