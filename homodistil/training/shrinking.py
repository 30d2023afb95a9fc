"""How the student of a run loses its neurons: importance, widths that are due, compensation, before step 0 and live.

The decisions are pruning/'s, the mathematics pruning/compensation's, the moving resize/'s; here they get what only a
run has: its text, its teacher, its probe and (trial_cuts.py) plain copies of the student that the engine holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from homodistil.data.masked_lm import Batch
from homodistil.data.prefetch import BatchPrefetcher
from homodistil.distill.snapshot import StudentSnapshots
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.distributed import ranks
from homodistil.evaluation.gap_probe import GapProbe
from homodistil.metrics.recorder import Recorder
from homodistil.models.axes import Keep, expand_to_teacher
from homodistil.models.resize_plan import ResizePlan, make_plan, slice_module
from homodistil.pruning.calibration import calibrate
from homodistil.pruning.compensation.student import EventChange, write_parameters
from homodistil.pruning.gap_schedule import GapSchedule
from homodistil.pruning.importance import Importance
from homodistil.pruning.protected_dims import protected_dims, variance_shares
from homodistil.pruning.pruner import Pruner
from homodistil.training.compensated_events import Compensation, stage_widths
from homodistil.training.inputs import RunInputs
from homodistil.training.resolve import ResolvedRun
from homodistil.training.trainer import Trainer, resize_event
from homodistil.training.trial_cuts import GapLook, live_copy, score_by_drawn_labels


class Shrinker:
    """Args:
    student: at its initial widths, not yet in an engine.
    gap: of that student and `teacher`.
    heldout_loss: plain student -> held-out MLM loss (nats), the same on every rank.
    """

    def __init__(
        self,
        resolved: ResolvedRun,
        run_inputs: RunInputs,
        student: Student,
        teacher: Teacher,
        gap: GapProbe,
        heldout_loss: Callable[[Student], float],
    ) -> None:
        self.config = config = resolved.config
        self.run_inputs, self.student, self.teacher, self.gap = run_inputs, student, teacher, gap
        self._heldout_loss, self._initial_widths = heldout_loss, student.widths
        self.pruner = self._build_pruner(resolved)
        compensated = config.pruning.compensation != "none" and config.pruning.schedule != "none"
        self.compensation = Compensation(config, run_inputs, resolved.teacher_widths["hidden"]) if compensated else None

    def _build_pruner(self, resolved: ResolvedRun) -> Pruner:
        config, schedule, target = self.config, resolved.make_schedule(), resolved.target
        importance = Importance(
            self.student.axis_table(), config.pruning, config.train.seed, device=self.run_inputs.device
        )
        shares = ranks.mean(variance_shares(self.student.model, self.student.family, self.gap.batches))
        narrows = target["hidden"] < self._initial_widths["hidden"]
        protected = protected_dims(shares, config.pruning.protect_outliers if narrows else 0.0, target["hidden"])
        if len(protected) and ranks.rank() == 0:
            found = ", ".join(f"{int(i)} ({float(shares[i]):.0%})" for i in protected)
            print(f"protected residual dims (share of the variance at a LayerNorm): {found}", flush=True)
        return Pruner(schedule, importance, protected)

    # -- without an engine: resume, and the one_shot schedule before step 0

    def restore(self, state: dict) -> None:
        """Cut the fresh student to the widths of a checkpoint's `state`; the engine's values are loaded later."""
        self._shrink(make_plan(self.student.axis_table(), expand_to_teacher(state["kept"], self._initial_widths)))
        self.pruner.load_state_dict(state["pruner"])

    def before_training(self, recorder: Recorder) -> None:
        """Check that compensation may do what it is asked to; then what one_shot cuts, in its stages."""
        self._check_rotation()
        due = self.pruner.schedule.due(0)
        for widths in stage_widths(self.student.widths, due, self.config.pruning.one_shot_stages):
            self._calibrate()
            self._cut(self.pruner.keep_of(widths, self.student.origins["hidden"]), recorder)

    def _check_rotation(self) -> None:
        """compensation=full: which residual dims must stay coordinates. A checkpoint remembers them."""
        narrows = self.pruner.schedule.target["hidden"] < self.student.widths["hidden"]
        if self.compensation and self.config.pruning.compensation == "full" and narrows:
            fixed = self.compensation.allowed_fixed_dims(self.student, self.pruner.protected, self._heldout_loss)
            self.pruner.may_rotate = fixed is not None
            if fixed is not None:
                self.pruner.protected = fixed

    def _calibrate(self) -> None:
        """Importance from a few batches of the same data and losses, without an update."""
        prefetcher = self.run_inputs.prefetcher(self.config, self.config.train.seed)
        if not self.pruner.importance.uses_training:
            return self._score_by_drawn_labels(self.student, prefetcher, 0)
        steps, table = self._calibration_steps(prefetcher, 0), self.student.axis_table()
        calibrate(self.pruner.importance, self.student, table, steps, lambda b: self.student(b, self.teacher(b)).total)

    def _cut(self, keep: Keep, recorder: Recorder) -> None:
        before, proposal = self.gap.measure(), self._propose(self.student, keep, 0)
        self._shrink(proposal.plan)
        event = resize_event(0, proposal.plan, before, self.gap.measure())
        if proposal.weights:
            event |= proposal.report | {"kl_after_cut": event["gap_after"]["kl"]}
            write_parameters(self.student, proposal.weights)
            event["gap_after"] = self.gap.measure()
        recorder.log_event(event)

    def _shrink(self, plan: ResizePlan) -> None:
        slice_module(self.student, plan)
        self.student.after_resize(plan.keep)
        self.pruner.after_resize(plan)

    # -- with an engine

    def plain_copies(self) -> StudentSnapshots | None:
        """For what is to be tried on a live engine's student; None where nothing is. Before an engine takes it."""
        closed_loop = isinstance(self.pruner.schedule, GapSchedule)
        is_asked = closed_loop or self.compensation or not self.pruner.importance.uses_training
        return StudentSnapshots(self.student) if is_asked else None

    def attach(self, trainer: Trainer, copies: StudentSnapshots, dtype: torch.dtype) -> None:
        """Let `trainer` compensate its events, and the pruner try cuts. `dtype`: what the live student computes in."""
        compensation = self.compensation

        def plain(dtype: torch.dtype = torch.float32) -> Student:
            return live_copy(trainer.engine, copies, dtype)

        def compensated_cut(student: Student, keep: Keep) -> Student:
            return compensation.cut(student, keep, trainer.state.consumed_samples, self.pruner.fixed, dtype)

        if compensation:
            self.pruner.look = lambda: GapLook(self.gap, plain, compensated_cut)
            trainer.compensate = lambda keep: self._propose(plain(), keep, trainer.state.consumed_samples)
        else:
            self.pruner.look = lambda: GapLook(self.gap, lambda: plain(dtype))
        self.pruner.rescore = lambda step: self._score_by_drawn_labels(plain(), trainer.prefetcher, step)

    def _propose(self, student: Student, keep: Keep, consumed_samples: int) -> EventChange:
        """The event that leaves `keep` of a plain student."""
        if self.compensation is None:
            return EventChange(make_plan(student.axis_table(), keep))
        return self.compensation.propose(student, keep, consumed_samples, self.pruner.fixed)

    def _score_by_drawn_labels(self, student: Student, prefetcher: BatchPrefetcher, step: int) -> None:
        steps, seed = self._calibration_steps(prefetcher, step), (self.config.train.seed, step)
        score_by_drawn_labels(self.pruner.importance, student, self.teacher, steps, seed)

    def _calibration_steps(self, prefetcher: BatchPrefetcher, step: int) -> Iterator[list[Batch]]:
        """What is trained on after `step` updates."""
        batch_size, num_batches = self.config.train.global_batch_size, self.config.pruning.calibration_batches
        return (prefetcher.micro_batches((step + i) * batch_size) for i in range(num_batches))

    # -- results

    def summary(self) -> dict[str, object]:
        """What the closed loop adds to the row of the result table; told on rank 0, too."""
        schedule = self.pruner.schedule
        if not isinstance(schedule, GapSchedule):
            return {}
        if ranks.rank() == 0:
            print(schedule.report(), flush=True)
        return schedule.summary()
