"""The loop. `train_step` is the whole method on one screen; everything it names is a file of its own."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from homodistil.checkpoint import Checkpoints
from homodistil.config.schema import RunConfig
from homodistil.data.masked_lm import Batch
from homodistil.data.prefetch import BatchPrefetcher
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.distill.teacher_outputs import TeacherOutputs
from homodistil.distributed import graceful_stop, watchdog
from homodistil.distributed.fault_injection import fault_point
from homodistil.engine.build import backward
from homodistil.engine.optimizer import cool_down, rewarm
from homodistil.evaluation.gap_probe import GapProbe
from homodistil.metrics.progress import doing
from homodistil.models.axes import Keep
from homodistil.models.parameter_shape import full_shape
from homodistil.models.resize_plan import ResizePlan
from homodistil.pruning.compensation.student import EventChange
from homodistil.pruning.milestones import Milestone
from homodistil.pruning.pruner import Pruner
from homodistil.resize import reset_moments, resize, step_applied, write_weights
from homodistil.training.gradient_scores import measure_importance
from homodistil.training.step_logger import StepLogger, require_applied, require_finite


@dataclass
class TrainState:
    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Position in the data: sequences seen by all ranks together."""


@dataclass(kw_only=True)
class Trainer:
    """Trains the engine's student to the last step. `teacher`, `pruner` and `gap` are None for plain MLM training."""

    config: RunConfig
    engine: object
    prefetcher: BatchPrefetcher
    step_log: StepLogger
    evaluate: Callable[[], dict[str, float]]
    teacher: Teacher | None = None
    pruner: Pruner | None = None
    gap: GapProbe | None = None
    compensate: Callable[[Keep], EventChange] | None = None
    checkpoints: Checkpoints | None = None
    fit_micro_batch: Callable[[], dict[str, int]] = dict
    export_milestone: Callable[[object, Milestone, TrainState], None] | None = None
    state: TrainState = field(default_factory=TrainState)

    @property
    def student(self) -> Student:
        return self.engine.module

    def train(self) -> None:
        try:
            with graceful_stop.at_step_boundaries(self.prefetcher.device) as stop_agreed:
                while not self.is_done:
                    self.train_step()
                    self.between_steps()
                    if number := stop_agreed():
                        self.leave(number)
        except BaseException:
            if self.checkpoints:
                self.checkpoints.settle()
            raise
        if self.checkpoints:
            self.checkpoints.wait()

    @property
    def is_done(self) -> bool:
        return self.state.step >= self.config.train.steps

    def train_step(self) -> None:
        fault_point("train.step")
        batches = self.prefetcher.micro_batches(self.state.consumed_samples)
        importance = None
        for batch in batches:
            targets = self.teacher(batch) if self.teacher else None  # no grad; in lock-step it runs with the student
            importance = self.train_micro_batch(batch, targets)
        self.end_step(batches, importance)

    def train_micro_batch(self, batch: Batch, targets: TeacherOutputs | None) -> Keep | None:
        """Forward, backward, and at the end of a step the update; what that says about importance."""
        terms = self.engine(batch, targets)
        backward(self.engine, fault_point("train.backward", terms.total))
        self.step_log.add(terms)
        importance = None
        if self.engine.is_gradient_accumulation_boundary():
            importance = self.measure_importance()  # reduced, unscaled gradients exist only here
        self.engine.step()
        return importance

    def end_step(self, batches: list[Batch], importance: Keep | None) -> None:
        """Count the step that has just been made of `batches`, and the event behind it."""
        require_applied(self.engine, self.state.step + 1, self.config)
        self.state.step += 1
        self.state.consumed_samples += self.config.train.global_batch_size
        self.step_log.end_step(self.state.step, batches, self.engine, self.prefetcher.wait_s)
        if importance is not None and step_applied(self.engine):  # an fp16 overflow tells nothing
            self.pruner.accept(importance)
        if plan := self.resize_due():  # None nearly always
            self.resize(plan)

    def measure_importance(self) -> Keep | None:
        if self.pruner is None or not self.pruner.wants_gradients(self.state.step + 1):
            return None
        shapes = {name: full_shape(p) for name, p in self.student.named_parameters()}
        return measure_importance(self.engine, self.pruner.importance, self.student.axis_table(), shapes)

    def resize_due(self) -> ResizePlan | None:
        """The event that is due; after a skipped step it waits for the next one."""
        if self.pruner is None or not step_applied(self.engine):
            return None
        return self.pruner.due(self.state.step, self.student.axis_table(), self.student.origins["hidden"])

    def resize(self, plan: ResizePlan) -> None:
        """Shrink everything that is numbered by neurons, and record what it did to the gap."""
        with self.step_log.timer.paused(), doing(f"resizing at step {self.state.step}"):
            before = self.gap.measure()
            require_finite(before, self.state.step, self.config)
            proposal = self.compensate(plan.keep) if self.compensate else EventChange(plan)
            plan = proposal.plan
            if not self.config.pruning.carry_moments:
                reset_moments(self.engine)
            cost = resize(self.engine, plan)
            self.student.after_resize(plan.keep)
            self.pruner.after_resize(plan)
            refit = self.refit(proposal)
            micro_batch = self.fit_micro_batch()  # from the next step on
            after = self.gap.measure()
            require_finite(after, self.state.step, self.config)
            rewarm(self.engine.lr_scheduler)
            if steps := self.pruner.settle_steps(plan.widths_after) * self.config.run.settle_cooldown:
                cool_down(self.engine.lr_scheduler, steps)
            event = resize_event(self.state.step, plan, before, after)
            event |= self.pruner.after_event(self.state.step, before["kl"], after["kl"]) | refit
            self.step_log.recorder.log_event(
                event | micro_batch | {"milliseconds": cost.milliseconds, "bytes_moved": cost.bytes_moved}
            )

    def refit(self, proposal: EventChange) -> dict[str, float]:
        """Give the engine the refitted weights of an event that it has gone through; what the event's line tells."""
        if not proposal.weights:
            return {}
        cut = self.gap.measure()["kl"]
        start_s = time.perf_counter()
        write_weights(self.engine, proposal.weights)
        return proposal.report | {"kl_after_cut": cut, "milliseconds_write": (time.perf_counter() - start_s) * 1e3}

    def between_steps(self) -> None:
        """Once in a while: milestone, held-out evaluation, checkpoint (which comes last: the others lie before it)."""
        train, step = self.config.train, self.state.step
        watchdog.progress(step, watchdog.TRAINING)
        if milestone := self.milestone_due():
            with self.step_log.timer.paused(), doing(f"exporting milestone {milestone.fraction:g}"):
                self.export_milestone(self.engine, milestone, self.state)
        last = step == train.steps
        if train.eval_every_steps and step % train.eval_every_steps == 0 and not last:
            with self.step_log.timer.paused(), doing(f"held-out evaluation at step {step}"):
                self.step_log.recorder.log_evaluation(step, self.evaluate())
        if self.checkpoints and (last or (train.save_every_steps and step % train.save_every_steps == 0)):
            with self.step_log.timer.paused(), doing(f"checkpoint of step {step}"):
                self.save()

    def milestone_due(self) -> Milestone | None:
        if self.export_milestone is None or self.pruner is None:
            return None
        return self.pruner.milestone_due(self.state.step, self.student.widths)

    def save(self) -> None:
        """A checkpoint, unless the weights have just become useless: the one before is then worth more."""
        require_finite(self.gap.measure(), self.state.step, self.config)
        state = {
            "step": self.state.step,
            "consumed_samples": self.state.consumed_samples,
            "kept": self.student.origins,
            "num_lines": dict(self.step_log.recorder.num_lines),
            "pruner": self.pruner.state_dict() if self.pruner else None,
        }
        self.checkpoints.save(self.engine, self.state.step, state)

    def save_and_wait(self) -> None:
        """Everything that going on needs, on disk."""
        with self.step_log.timer.paused(), doing(f"stopping: writing the checkpoint of step {self.state.step}"):
            self.save()
            self.checkpoints.wait()

    def leave(self, number: int) -> None:
        """Stop on request (signal `number`), with everything on disk that going on needs."""
        name, step = signal.Signals(number).name, self.state.step
        if self.checkpoints is None:
            text = f"stopped by {name} while correcting the teacher, which the next run starts anew"
            raise graceful_stop.stopped(number, text + graceful_stop.go_on_with())
        self.save_and_wait()
        text = f"stopped by {name} at step {step} of {self.config.train.steps}"
        raise graceful_stop.stopped(
            number, f"{text}; run.resume=auto goes on from its checkpoint{graceful_stop.go_on_with()}"
        )


def resize_event(step: int, plan: ResizePlan, before: dict[str, float], after: dict[str, float]) -> dict:
    """A line of events.jsonl: widths that changed, gap before and after, the keep's hash."""
    changed = [axis for axis, width in plan.widths_after.items() if width != plan.widths_before[axis]]
    return {
        "step": step,
        "hash": plan.hash,
        "widths_before": plan.widths_before,
        "widths_after": plan.widths_after,
        "changed": changed,
        "gap_before": before,
        "gap_after": after,
    }
