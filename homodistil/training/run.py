"""One student from one teacher: put the parts together, train, export, evaluate. Also the one-shot control."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from homodistil.checkpoint import Checkpoints
from homodistil.checkpoint.checkpoints import Found
from homodistil.checkpoint.random_state import seed_random_state
from homodistil.config.schema import RunConfig
from homodistil.data.prepare.integrity import json_object
from homodistil.distill.build_teacher import build_teacher
from homodistil.distill.losses.relations import relation_layer
from homodistil.distill.objective import Objective
from homodistil.distill.snapshot import StudentSnapshots
from homodistil.distill.stored_teacher import StoredTeacher, head_alone
from homodistil.distill.student import Student
from homodistil.distill.student_compile import CompiledLayers
from homodistil.distill.teacher import Teacher, load_config
from homodistil.distributed import ranks
from homodistil.engine.build import build_engine
from homodistil.engine.ds_config import student_dtype, teacher_dtype, zero_stage
from homodistil.engine.engine import TrainingEngine
from homodistil.evaluation.gap_probe import PROBE_SEQUENCES, GapProbe
from homodistil.files import write_atomically, writing
from homodistil.metrics.progress import doing
from homodistil.metrics.recorder import METRICS_FILE, Recorder, read_lines
from homodistil.metrics.result_table import HELDOUT_COLUMNS, ROW_FILE
from homodistil.models.activations import show_values
from homodistil.resize import check_removable, check_supported
from homodistil.training.exporter import Exporter
from homodistil.training.fingerprints import check_same
from homodistil.training.heldout_scores import HeldoutScores
from homodistil.training.inputs import PERIODIC_EVALUATION_SEQUENCES, RunInputs, teacher_copy
from homodistil.training.micro_batch import MicroBatchPolicy, with_micro_batch
from homodistil.training.milestone_exports import Family
from homodistil.training.resolve import resolve_run
from homodistil.training.run_folder import EXPORT_FOLDER
from homodistil.training.shrinkable import LiveStudent
from homodistil.training.shrinking import Shrinker
from homodistil.training.step_logger import StepLogger, run_recorder, speeds
from homodistil.training.train_state import TrainState
from homodistil.training.trainer import Trainer


class DistillationRun:
    """A run folder's worth of work: checkpoints, metrics, export and the row of the result table.

    Args:
        engine_config: from `resolve_engine_config`.
        folder: run folder; a checkpoint found in it is resumed from.
        command: for the model card.
        teacher_of: another student's run, whose teacher this one learns from as well.
    """

    def __init__(
        self,
        config: RunConfig,
        engine_config: dict,
        run_inputs: RunInputs,
        folder: Path,
        command: str,
        teacher_of: DistillationRun | None = None,
    ) -> None:
        self.config, self.engine_config, self.run_inputs = config, engine_config, run_inputs
        self.folder = folder
        device, dtype = run_inputs.device, teacher_dtype(config.teacher.dtype, engine_config, run_inputs.device)
        self.resolved = resolve_run(config, load_config(run_inputs.teacher))
        self.teacher_widths = self.resolved.teacher_widths
        self.scores = HeldoutScores(config, run_inputs, self.resolved.family)
        self.teacher = teacher_of.teacher if teacher_of else self._build_teacher(device, dtype)
        load = functools.partial(teacher_copy, run_inputs, torch.float32, config.student.dropout)
        self.student = self.resolved.build_student(load).to(device)
        self.initial_widths = self.student.widths
        self.micro_batch = MicroBatchPolicy(config, engine_config, self.student, dtype, ranks.world_size())
        self.gap = GapProbe(self.student, self.teacher, self._probe(), device)
        parts = (self.student, self.teacher, self.gap)
        self.shrinker = Shrinker(self.resolved, run_inputs, *parts, self._heldout_loss, student_dtype(engine_config))
        self.pruner = self.shrinker.pruner
        self.exporter = Exporter(config, run_inputs, self.student, self.teacher_widths, command)
        self.family = Family(config, folder, self.exporter, self._row)
        layout = {"ranks": ranks.world_size(), "zero_optimization.stage": zero_stage(engine_config)}
        layout["precision"] = str(student_dtype(engine_config))
        inputs = run_inputs.fingerprints, run_inputs.require_intact
        notes = {"layout": layout, "config": config.to_dict()}
        self.checkpoints = Checkpoints(folder / "checkpoints", config.run, config.train.seed, notes, *inputs)

    def run(self) -> dict:
        """Train to the end (from the last checkpoint if there is one), export and evaluate. Returns the row."""
        if row := self.finished_row():
            return row
        with self.training() as trainer:
            trainer.train()
            return self.finish(trainer)

    def finished_row(self) -> dict | None:
        """The row, where all of this has been done before; one that cannot be read is made again."""
        path = self.folder / ROW_FILE
        return ranks.on_rank_zero(lambda: _read_row(path))

    @contextlib.contextmanager
    def training(self) -> Iterator[Trainer]:
        """A trainer that resumes from the last checkpoint if there is one; inside, its recorder is open."""
        with doing("looking through the checkpoints"):
            checkpoint = self.checkpoints.load()
        check_same(
            self.folder, checkpoint.run.get("fingerprints") if checkpoint else None, self.run_inputs.fingerprints
        )
        start = self._restore_shape(checkpoint.state) if checkpoint else TrainState()
        with run_recorder(self.folder, self.config, start.step, _num_lines(checkpoint)) as recorder:
            if checkpoint:
                self._say_where(checkpoint)
            else:
                with doing("measuring the student before step 1"):
                    recorder.log_evaluation(0, self._gap_values())
                    self.shrinker.before_training(recorder)
            yield self.build_trainer(recorder, start, checkpoint)

    def _say_where(self, checkpoint: Found) -> None:
        if ranks.rank() == 0:
            print(f"resumed from step {checkpoint.state['step']} (checkpoint {checkpoint.folder})", flush=True)

    def build_trainer(self, recorder: Recorder, start: TrainState, checkpoint: Found | None = None) -> Trainer:
        """The live engine around the student, and the loop. `checkpoint`: whose values the engine takes over."""
        config = self.config
        micro_batch = self.micro_batch(self.student.widths)
        engine_config = with_micro_batch(self.engine_config, micro_batch, ranks.world_size())
        snapshots = self.shrinker.snapshots()
        with doing("building DeepSpeed's engine, and trying a resize of it"):
            engine = build_engine(self.student, config.train, config.optimizer, engine_config)
        if any(self.resolved.depth.table):
            check_removable(engine.deepspeed, self.student.layer_parameters(range(1, self.student.num_layers)))
        if config.student.compile:
            family, model = self.student.family, self.student.model
            num_kinds = family.num_layer_kinds(model)
            CompiledLayers(family.layers(model), self.pruner.schedule.num_events, num_kinds=num_kinds)
        if checkpoint:
            with doing(f"reading {checkpoint.folder}"):
                self.checkpoints.restore(engine.deepspeed, checkpoint)
                check_supported(engine.deepspeed)  # what was loaded is laid out as resizing expects
        else:
            seed_random_state(config.train.seed, ranks.rank(), start.step)  # of dropout
        trainer = self._trainer(engine, snapshots, recorder, start)
        if checkpoint and (state := checkpoint.state.get("step_log")):  # checkpoints of before have none
            trainer.step_log.load_state_dict(state)
        return trainer

    # -- parts

    def _probe(self):
        share = -(-PROBE_SEQUENCES // ranks.world_size())
        return list(self.run_inputs.heldout(self.config, PROBE_SEQUENCES, batch_size=share))

    def _build_teacher(self, device: torch.device, dtype: torch.dtype) -> Teacher:
        config, head = self.config, self.run_inputs.sentence_head()
        if config.teacher.is_stored:
            has_labels = self.run_inputs.head == "classifier"
            labels = head_alone(teacher_copy(self.run_inputs, dtype), device) if has_labels else None
            return StoredTeacher(self.resolved.teacher, device, head, labels)
        model = teacher_copy(self.run_inputs, dtype)
        if "values" in Objective(config.loss).needs:
            show_values(model, self.resolved.family, relation_layer(config.loss, model.config.num_hidden_layers))
        return build_teacher(model, config.teacher, device, dtype, head)

    def _heldout_loss(self, student: Student) -> float:
        return self.scores.loss_of(student, PERIODIC_EVALUATION_SEQUENCES)

    def _trainer(
        self, engine: TrainingEngine, snapshots: StudentSnapshots | None, recorder: Recorder, start: TrainState
    ) -> Trainer:
        config, run_inputs = self.config, self.run_inputs
        dtype = student_dtype(self.engine_config)
        with doing("measuring this machine's peak"):
            step_log = StepLogger(config, recorder, self.student, self.teacher_widths, run_inputs.device, dtype)
        if ranks.rank() == 0:
            print(f"MFU refers to {step_log.peak.flops_per_s / 1e9:,.0f} GFLOP/s a rank ({step_log.peak.source})")
        prefetcher = run_inputs.prefetcher(config, config.train.seed)
        prefetcher.set_micro_batch_size(engine.micro_batch_size)
        engine.set_width_share(self.shrinker.rate_share)
        return Trainer(
            config=config,
            engine=engine,
            teacher=self.teacher if self.student.objective.needs_teacher else None,
            prefetcher=prefetcher,
            step_log=step_log,
            checkpoints=self.checkpoints,
            gap=self.gap,
            shrinker=self.shrinker,
            live=LiveStudent(engine, snapshots, config.pruning.carry_moments, self.micro_batch, prefetcher),
            evaluate=lambda: self.evaluate(PERIODIC_EVALUATION_SEQUENCES) | self._gap_values(),
            export_milestone=self.family.export if config.run.export_milestones else None,
            state=start,
        )

    def _restore_shape(self, state: dict) -> TrainState:
        self.shrinker.restore(state)
        return TrainState(state["step"], state["consumed_samples"])

    # -- results

    def evaluate(self, limit: int | None = None) -> dict[str, float]:
        """Held-out results of the student on the first `limit` blocks (None: all)."""
        return self.scores.of_student(self.student, self.teacher, limit)

    def evaluate_teacher(self) -> dict[str, float]:
        """Held-out scores of the teacher itself, over all blocks."""
        with doing("evaluating the teacher on held-out text"):
            return self.scores.of_teacher(self.teacher)

    def _gap_values(self) -> dict[str, float]:
        return {f"gap/{name}": value for name, value in self.gap.measure().items()}

    def finish(self, trainer: Trainer) -> dict:
        """Export and evaluate what has been trained. Returns the row, which is then on disk."""
        engine, recorder = trainer.engine, trainer.step_log.recorder
        with doing("evaluating the student on held-out text"):
            measured = self.evaluate()
        recorder.log_evaluation(self.config.train.steps, measured | self._gap_values())
        row = self._row(measured)
        with doing("exporting the student"):
            self.exporter.export(engine, self.folder / EXPORT_FOLDER, row)
        engine.destroy()
        row |= self.shrinker.summary()
        row |= ranks.on_rank_zero(lambda: speeds(read_lines(self.folder / METRICS_FILE)))
        ranks.on_rank_zero(lambda: self._write_row(row))
        recorder.log_result(row)
        return row

    def _row(self, measured: dict[str, float] | None = None) -> dict:
        """The student as a row of the result table. `measured`: its held-out results where they exist already."""
        name, parameters = self.config.run.name, self.student.num_parameters()
        return result_row(name, parameters, self.student.widths["hidden"], measured or self.evaluate())

    def _write_row(self, row: dict) -> None:
        with writing(self.folder / ROW_FILE):
            write_atomically(self.folder / ROW_FILE, json.dumps(row) + "\n")


def result_row(name: str, parameters: int, hidden_size: int, measured: dict[str, float]) -> dict:
    """A row of the result table from held-out results, in the numbers of their task."""
    columns = {column: measured[name] for name, column in HELDOUT_COLUMNS.items() if name in measured}
    return {"name": name, "parameters": parameters, "hidden_size": hidden_size, **columns}


def _read_row(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        return json_object(path)
    except ValueError as error:
        print(f"warning: {path} is damaged ({error}); made again", file=sys.stderr, flush=True)
        return None


def _num_lines(checkpoint: Found | None) -> dict[str, int] | None:
    """Lines of each log, as the checkpoint knows them; checkpoints of before did not."""
    return checkpoint.state.get("num_lines") if checkpoint else None
