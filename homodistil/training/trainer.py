"""The loop. `train_step` is the whole method on one screen; everything it names is a file of its own.

`record_function("step.NAME")` marks the parts of a step for torch.profiler (benchmarks/harness/step_parts.py).
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

from torch.profiler import record_function

from homodistil.checkpoint import Checkpoints
from homodistil.config.schema import RunConfig
from homodistil.data.batch import Batch
from homodistil.data.prefetch import BatchPrefetcher
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.distill.teacher_outputs import TeacherOutputs
from homodistil.distributed import graceful_stop, watchdog
from homodistil.distributed.fault_injection import fault_point
from homodistil.engine.engine import TrainingEngine
from homodistil.evaluation.gap_probe import GapProbe
from homodistil.metrics.progress import doing
from homodistil.models.axes import Keep
from homodistil.pruning.milestones import Milestone
from homodistil.training.shrinkable import LiveStudent
from homodistil.training.shrinking import Shrinker
from homodistil.training.step_logger import StepLogger, require_applied, require_finite
from homodistil.training.train_state import TrainState


@dataclass(kw_only=True)
class Trainer:
    """Trains the engine's student to the last step. What only distillation needs is None for plain MLM training."""

    config: RunConfig
    engine: TrainingEngine
    prefetcher: BatchPrefetcher
    step_log: StepLogger
    evaluate: Callable[[], dict[str, float]]
    teacher: Teacher | None = None
    gap: GapProbe | None = None
    shrinker: Shrinker | None = None
    live: LiveStudent | None = None
    """The engine's student, as `shrinker` changes it."""
    checkpoints: Checkpoints | None = None
    export_milestone: Callable[[TrainingEngine, Milestone, TrainState], None] | None = None
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
        """One optimizer step, and the pruning event behind it if one is due."""
        fault_point("train.step")
        with record_function("step.data"):
            batches = self.prefetcher.micro_batches(self.state.consumed_samples)
        for batch in batches:
            with record_function("step.teacher"):  # no gradient; layer by layer it runs inside the student's forward
                targets = self.teacher(batch) if self.teacher else None
            self.train_micro_batch(batch, targets)
        self.end_step(batches)

    def train_micro_batch(self, batch: Batch, targets: TeacherOutputs | None) -> None:
        drops_out = self.config.student.dropout > 0
        with record_function("step.student"), self.engine.module.dropping_out() if drops_out else nullcontext():
            terms = self.engine(batch, targets)  # the total and every named term
        with record_function("step.backward"):
            self.engine.accumulate(fault_point("train.backward", terms.total))
        with record_function("step.log"):
            self.step_log.add(terms)

    def end_step(self, batches: list[Batch]) -> None:
        """Update the weights from what has been accumulated over `batches`; then the event, if one is due."""
        with record_function("step.measure"):  # reduced, unclipped gradients exist only here
            scores = self.shrinker.measure(self.engine, self.state.step + 1) if self.shrinker else None
        with record_function("step.update"):
            applied = self.engine.update()
        require_applied(self.engine, self.state.step + 1, self.config)
        self.state.step += 1
        self.state.consumed_samples += self.config.train.global_batch_size
        with record_function("step.log"):
            self.step_log.end_step(self.state.step, batches, self.engine, self.prefetcher.wait_s)
        if self.shrinker and applied:  # after a skipped step an event waits for the next one
            with record_function("step.resize"):
                self.shrinker.accept(scores)
                if self.shrinker.layers_due(self.state) is not None:  # None nearly always, as below
                    self.remove_layers()
                if keep := self.shrinker.due(self.live, self.prefetcher, self.state):  # None nearly always
                    self.resize(keep)

    def remove_layers(self) -> None:
        """The event in which layers leave."""
        with self.step_log.timer.paused(), doing(f"removing layers at step {self.state.step}"):
            self.shrinker.remove_layers(self.live, self.prefetcher, self.state, self.step_log.recorder)

    def resize(self, keep: Keep) -> None:
        """The event that leaves `keep` of the axes that it names."""
        with self.step_log.timer.paused(), doing(f"resizing at step {self.state.step}"):
            self.shrinker.shrink(self.live, keep, self.state, self.step_log.recorder)

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
        if self.export_milestone is None or self.shrinker is None:
            return None
        return self.shrinker.pruner.milestone_due(self.state.step, self.student.widths)

    def save(self) -> None:
        """A checkpoint, unless the weights have just become useless: the one before is then worth more."""
        require_finite(self.gap.measure(), self.state.step, self.config)
        state = {
            "step": self.state.step,
            "consumed_samples": self.state.consumed_samples,
            "kept": self.student.origins,
            "layers": list(self.student.layers),
            "num_lines": dict(self.step_log.recorder.num_lines),
            "pruner": self.shrinker.pruner.state_dict() if self.shrinker else None,
            "step_log": self.step_log.state_dict(),
        }
        self.checkpoints.save(self.engine.deepspeed, self.state.step, state)

    def save_and_wait(self) -> None:
        """Everything that resuming needs, on disk."""
        with self.step_log.timer.paused(), doing(f"stopping: writing the checkpoint of step {self.state.step}"):
            self.save()
            self.checkpoints.wait()

    def leave(self, number: int) -> None:
        """Stop on request (signal `number`), with everything on disk that resuming needs."""
        name, step = signal.Signals(number).name, self.state.step
        if self.checkpoints is None:
            text = f"stopped by {name} while correcting the teacher, which the next run starts anew"
            raise graceful_stop.stopped(number, text + graceful_stop.go_on_with())
        self.save_and_wait()
        text = f"stopped by {name} at step {step} of {self.config.train.steps}"
        raise graceful_stop.stopped(
            number, f"{text}; run.resume=auto goes on from its checkpoint{graceful_stop.go_on_with()}"
        )
