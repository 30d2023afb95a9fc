"""The loop. `train_step` is the whole method on one screen; everything it names is a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from homodistil.checkpoint import Checkpoints
from homodistil.config import RunConfig
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.evaluation.gap import Gap
from homodistil.feed import Feed
from homodistil.monitor import Monitor, require_finite
from homodistil.pruning.scheduler import Pruner
from homodistil.resize import ResizePlan, gradient_fragments, resize


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
    feed: Feed
    monitor: Monitor
    evaluate: Callable[[], dict[str, float]]
    teacher: Teacher | None = None
    pruner: Pruner | None = None
    gap: Gap | None = None
    checkpoints: Checkpoints | None = None
    after_event: Callable[[], None] = lambda: None
    state: TrainState = field(default_factory=TrainState)

    @property
    def student(self) -> Student:
        return self.engine.module

    def train(self) -> None:
        while self.state.step < self.config.train.steps:
            self.train_step()
            self.between_steps()

    def train_step(self) -> None:
        batches = self.feed.micro_batches(self.state.consumed_samples)
        for batch in batches:
            teacher = self.teacher(batch) if self.teacher else None  # no grad, inference precision
            terms = self.engine(batch, teacher)
            self.engine.backward(terms.total)
            self.monitor.see(terms)
            if self.engine.is_gradient_accumulation_boundary():
                self.accumulate_importance()  # reduced, unscaled gradients exist only here
            self.engine.step()
        self.state.step += 1
        self.state.consumed_samples += self.config.train.global_batch_size
        self.monitor.end_step(self.state.step, batches, self.engine)
        if plan := self.resize_due():  # None nearly always
            self.resize(plan)

    def accumulate_importance(self) -> None:
        if self.pruner and self.pruner.wants_gradients(self.state.step + 1):
            shapes = {name: tuple(p.shape) for name, p in self.student.named_parameters()}
            self.pruner.accumulate(gradient_fragments(self.engine), self.student.axis_table(), shapes)

    def resize_due(self) -> ResizePlan | None:
        if self.pruner is None:
            return None
        return self.pruner.due(self.state.step, self.student.axis_table(), self.student.kept["hidden"])

    def resize(self, plan: ResizePlan) -> None:
        """Shrink everything that is numbered by neurons, and record what it did to the gap."""
        with self.monitor.timer.paused():
            before = self.gap.measure()
            require_finite(before, self.state.step, self.config)
            cost = resize(self.engine, plan)
            self.student.after_resize(plan.keep)
            self.pruner.after_resize(plan)
            after = self.gap.measure()
            event = resize_event(self.state.step, plan, before, after)
            self.monitor.recorder.log_event(
                event | {"milliseconds": cost.milliseconds, "bytes_moved": cost.bytes_moved}
            )
            self.after_event()

    def between_steps(self) -> None:
        """Once in a while: held-out evaluation, checkpoint."""
        train, step = self.config.train, self.state.step
        last = step == train.steps
        if train.eval_every_steps and step % train.eval_every_steps == 0 and not last:
            with self.monitor.timer.paused():
                self.monitor.recorder.log_evaluation(step, self.evaluate())
        if self.checkpoints and (last or (train.save_every_steps and step % train.save_every_steps == 0)):
            with self.monitor.timer.paused():
                self.save()

    def save(self) -> None:
        """A checkpoint, unless the weights have just become useless: the one before is then worth more."""
        require_finite(self.gap.measure(), self.state.step, self.config)
        state = {
            "step": self.state.step,
            "consumed_samples": self.state.consumed_samples,
            "kept": self.student.kept,
            "pruner": self.pruner.state_dict() if self.pruner else None,
        }
        self.checkpoints.save(self.engine, self.state.step, state)


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
