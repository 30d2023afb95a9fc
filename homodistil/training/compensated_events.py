"""Compensated events of a run: what they are calibrated on, and whether the teacher tolerates a projection.

pruning/compensation/student.py turns a keep into an event; here it gets training text and the run's settings.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from homodistil.config.derive import calibration_config
from homodistil.config.schema import RunConfig
from homodistil.data.batch import Batch
from homodistil.data.prefetch import mean_counts
from homodistil.distill.student import Student
from homodistil.distributed import ranks
from homodistil.models.axes import Keep
from homodistil.pruning.compensation import Options, rotation_only
from homodistil.pruning.compensation.labels import logit_distance, mean_distance
from homodistil.pruning.compensation.student import EventChange, propose, propose_layers, residual_map
from homodistil.pruning.compensation.vectors import mean_turn
from homodistil.training.inputs import RunInputs

CHECK_SEQUENCES = 512
"""Maximum number of sequences, over all ranks, that the rotation check reads: it costs as much as an event, and only
compares a mean with a limit."""
HeldOutLoss = Callable[[Student], float]
"""Plain student -> held-out MLM loss (nats), the same on every rank."""


class Compensation:
    """Prepares compensated events: calibration text, options and the rotation check.

    Args:
        hidden: residual dims of the teacher.
    """

    def __init__(self, config: RunConfig, run_inputs: RunInputs, hidden: int) -> None:
        self.config, self.run_inputs, self._hidden = config, run_inputs, hidden
        calibration, self.num_sequences = calibration_config(config, ranks.world_size())
        self._loader = run_inputs.loader(calibration, config.train.seed)

    def batches(self, consumed_samples: int) -> list[Batch]:
        """This rank's calibration micro-batches: of what comes next in training, masked as it will be there."""
        batches, device = self._loader[consumed_samples], self.run_inputs.device
        counts = mean_counts(batches, device)
        return [batch._replace(counts=counts).to(device) for batch in batches]

    def propose(self, student: Student, keep: Keep, consumed_samples: int, fixed: Tensor | None) -> EventChange:
        """The compensated event that leaves `keep` of a plain fp32 student, which is not changed. Every rank calls it.

        Args:
            fixed: as dims of the teacher; None: nothing is rotated, whatever pruning.compensation is (`refit`).
        """
        options = self.options(consumed_samples)
        if fixed is None:
            options, fixed = dataclasses.replace(options, mode="refit"), torch.empty(0, dtype=torch.int64)
        elif student.widths["hidden"] < self._hidden:  # an event has brought them to the front
            fixed = torch.arange(len(fixed))
        return self._timed(lambda batches: propose(student, keep, batches, options, fixed), consumed_samples)

    def propose_layers(self, student: Student, kept: Sequence[int], consumed_samples: int) -> EventChange:
        """The compensated event after which a plain fp32 student, which is not changed, has the layers `kept` left.
        Every rank calls it."""
        options = self.options(consumed_samples)
        return self._timed(lambda batches: propose_layers(student, kept, batches, options), consumed_samples)

    def _timed(self, make: Callable[[list[Batch]], EventChange], consumed_samples: int) -> EventChange:
        """What `make` makes of the calibration text, with the report as the event's line has it."""
        start_s = time.perf_counter()
        change = make(self.batches(consumed_samples))
        report = {
            "variance_lost": change.report["lost"],
            "milliseconds_compensate": (time.perf_counter() - start_s) * 1e3,
        }
        return dataclasses.replace(change, report=report)

    def allowed_fixed_dims(self, student: Student, protected: Tensor, loss: HeldOutLoss) -> Tensor | None:
        """The check before step 0 of compensation=full and project: dims that must stay coordinates, none or
        `protected`; None where a rotation costs too much even with `protected` left out, so that events may only refit.

        Where gains of norms can be folded there is nothing to check. The weights of a LayerNorm that ends a block do
        not commute with a rotation. Where they differ much between dims, rotating alone
        costs more than it can win. The teacher as it came does not tell what it will cost after the correction (four
        with ever more uneven LayerNorms: KL between rotated and not .15 to .16 before, rises of .07 to .20 after), so
        this looks at the corrected one, and refuses nothing.

        Args:
            student: plain, at the teacher's widths; not changed.
            protected: what protect_outliers names.
        """
        if student.family.rotation_is_exact(student.model):
            return protected[:0]
        limit, before = self.config.pruning.compensation_limit, loss(student) if self.run_inputs.with_head else 0.0
        rises: list[float] = []
        for fixed in [protected[:0]] + ([protected] if len(protected) else []):
            rises.append(self._rotated_loss(student, fixed, loss) - before)
            if rises[-1] <= limit:
                self._tell(before, rises, limit, fixed)
                return fixed
        self._tell(before, rises, limit, None)
        return None

    def _rotated_loss(self, student: Student, fixed: Tensor, loss: HeldOutLoss) -> float:
        """Held-out loss of the rotated student; of one without a head the share of its hidden states' variance that is
        lost, 0 before, of an embedder how far its vectors turn (mean of 1 - cosine), and of a classifier the KL of its
        labels, or the share of its scores' variance that is lost."""
        table, options, batches = student.family.axis_table(student.model), self.options(0), self._check_batches()
        rotated = rotation_only(student.model, student.family, table, batches, options, fixed)
        if options.pooling is not None:
            models = student.model, rotated.model
            turn = mean_turn(models, residual_map(student, rotated.plan), student.family, batches, options.pooling)
            total, count = ranks.total(torch.tensor(turn, dtype=torch.float64, device=self.run_inputs.device)).tolist()
            return total / count
        if options.logits is not None:
            models = student.model, rotated.model
            sums = ranks.total(logit_distance(models, student.family, batches, options.logits))
            return mean_distance(sums, options.logits)
        if not self.run_inputs.with_head:
            return rotated.report["lost"]
        return loss(Student(rotated.model, student.objective.config, distil=False))

    def _check_batches(self) -> list[Batch]:
        """This rank's first calibration micro-batches, `CHECK_SEQUENCES` sequences over all ranks at most, one
        micro-batch at least."""
        batches = self.batches(0)
        return batches[: -(-CHECK_SEQUENCES // (ranks.world_size() * len(batches[0].input_ids)))]

    def _tell(self, before: float, rises: list[float], limit: float, fixed: Tensor | None) -> None:
        if ranks.rank() == 0:
            measured = ", then ".join(f"{rise:+.3f}" for rise in rises)
            print(
                f"rotation at full width: {self._measured(before)}, {measured} (limit {limit:g}){_outcome(fixed)}",
                flush=True,
            )

    def _measured(self, before: float) -> str:
        """What `_rotated_loss` measures, in words."""
        if self.run_inputs.sentence_modules is not None:
            return "1 - cosine of vectors"
        if self.run_inputs.logits is not None:
            return "KL of labels" if self.run_inputs.logits == "categories" else "variance of scores lost"
        return f"held-out loss {before:.3f}" if self.run_inputs.with_head else "variance of hidden states lost"

    def options(self, consumed_samples: int) -> Options:
        """How the event after so many samples is compensated, as the config has it."""
        pruning, train = self.config.pruning, self.config.train
        # A prime above the number of steps: runs of neighbouring seeds share no draw.
        seed = train.seed * 1_000_003 + consumed_samples // train.global_batch_size
        basis, inputs = pruning.basis, self.run_inputs
        if basis == "auto":  # gradients of a head that is not there cannot say what matters
            weighs = inputs.with_head or inputs.pooling is not None or inputs.logits is not None
            basis = "fisher" if weighs else "pca"
        return Options(
            mode=pruning.compensation,
            ridge=pruning.compensation_ridge,
            basis=basis,
            basis_steps=pruning.basis_steps,
            basis_lr=pruning.basis_lr,
            pooling=inputs.pooling,
            logits=inputs.logits,
            seed=seed,
        )


def _outcome(fixed: Tensor | None) -> str:
    if fixed is None:
        return (
            "; too much for this teacher, so events are compensated as with pruning.compensation=refit (to rotate all "
            "the same, raise pruning.compensation_limit, or lower pruning.protect_outliers: more dims then stay)"
        )
    return f"; with residual dims {', '.join(map(str, fixed.tolist()))} kept as they are" if len(fixed) else ""
