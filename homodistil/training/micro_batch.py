"""How many sequences fit at once: the micro-batch grows into the memory that resizing frees (run.grow_micro_batch).

The size is a function of the widths and the config alone. So every rank finds the same without talking, and a resumed
run finds it again without having stored it.
"""

from __future__ import annotations

import functools
import math

import torch

from homodistil.config.schema import RunConfig
from homodistil.data.prefetch import BatchPrefetcher
from homodistil.data.task import task_of
from homodistil.distill.cost import sequence_bytes
from homodistil.distill.student import Student
from homodistil.engine.ds_config import accumulation_dtype, offloads_optimizer, student_dtype, zero_stage
from homodistil.engine.engine import TrainingEngine
from homodistil.models.attention import keeps_probabilities
from homodistil.models.axes import Widths, num_layers
from homodistil.models.memory import SequenceBytes, StateLayout, state_bytes


class MicroBatchPolicy:
    """Widths -> sequences of a micro-batch on one rank.

    The budget is what `train.micro_batch_size` takes at the widths of `student`; later sizes stay within it.

    Args:
        student: at its first widths (the teacher's), before an engine holds it.
        engine_config: from `resolve_engine_config`.
        teacher_dtype: of the teacher's activations.
        device_type: where the student will run; None: where it is.
    """

    def __init__(
        self,
        config: RunConfig,
        engine_config: dict,
        student: Student,
        teacher_dtype: torch.dtype,
        num_ranks: int,
        device_type: str | None = None,
    ) -> None:
        self.config, self.teacher_dtype = config, teacher_dtype
        self.layout = state_layout(engine_config, num_ranks)
        self.start_widths = student.widths
        self._table = student.axis_table()
        self._family = student.family
        self._shapes = {name: (tuple(p.shape), p.requires_grad) for name, p in student.named_parameters()}
        self._layers = [student.layer_parameters([i]) for i in range(student.num_layers)]
        self._vocab_size = student.model.config.vocab_size
        self._device_type = device_type or student.model.device.type
        # Asked several times at the same widths, one after the other; the parts of a plan also ask for the teacher's.
        self._counts_at, self._bytes_at = (functools.lru_cache(4)(f) for f in (self._count, self._sequence_bytes))
        start, steps = config.train.micro_batch_size, config.train.global_batch_size // num_ranks
        self.sizes = micro_batch_sizes(start, steps // start) if config.run.grow_micro_batch else [start]
        self.budget_bytes = self.rank_bytes(self.start_widths, start)

    def __call__(self, widths: Widths) -> int:
        """The largest of `sizes` within the budget at the current widths."""
        fitting = [size for size in self.sizes if self.rank_bytes(widths, size) <= self.budget_bytes]
        return max(fitting, default=self.sizes[0])

    def rank_bytes(self, widths: Widths, micro_batch_size: int) -> float:
        """Predicted bytes on one rank: weights, gradients and optimizer, and the micro-batch's activations."""
        state = state_bytes(*self.parameter_counts(widths), self.layout)
        return state + micro_batch_size * self.sequence_bytes(widths).total

    def parameter_counts(self, widths: Widths) -> tuple[int, int]:
        """(trainable, frozen) elements, distillation projections included."""
        return self._counts_at(frozenset(widths.items()))

    def _count(self, widths: frozenset[tuple[str, int]]) -> tuple[int, int]:
        sizes, counts = self._table.dim_sizes(dict(widths)), {True: 0, False: 0}
        gone = set().union(*self._layers[num_layers(dict(widths)) :])  # layers are alike: which ones does not matter
        for name in self._shapes.keys() - gone:
            shape, is_trainable = self._shapes[name]
            counts[is_trainable] += math.prod(sizes.get((name, dim), size) for dim, size in enumerate(shape))
        return counts[True], counts[False]

    def sequence_bytes(self, widths: Widths) -> SequenceBytes:
        """Activations of one sequence of a micro-batch."""
        return self._bytes_at(frozenset(widths.items()))

    def _sequence_bytes(self, widths: frozenset[tuple[str, int]]) -> SequenceBytes:
        data = self.config.data
        return sequence_bytes(
            dict(widths),
            self.start_widths,
            self.config.loss,
            seq_len=data.seq_len,
            target_rows=task_of(data, self._family.task).target_rows(data),
            vocab_size=self._vocab_size,
            student_bytes=self.layout.dtype.itemsize,
            teacher_bytes=self.teacher_dtype.itemsize,
            lock_step=self.config.teacher.in_lock_step or self.config.teacher.is_stored,
            keeps_probabilities=keeps_probabilities(self._device_type, self.layout.dtype),
            architecture=self._family.architecture,
        )


def micro_batch_sizes(start: int, accumulation_steps: int) -> list[int]:
    """Sizes to choose from, ascending: `start` and what follows as accumulation steps lose their prime factors.

    Each number of steps divides all before it, so that DeepSpeed's count of micro-steps is on a boundary whichever
    sizes a run came by: 12 steps become 6, 3, 1, never 4.
    """
    sizes, steps = [start], accumulation_steps
    while steps > 1:
        factor = next(n for n in range(2, steps + 1) if steps % n == 0)
        steps //= factor
        sizes.append(sizes[-1] * factor)
    return sizes


def state_layout(engine_config: dict, num_ranks: int) -> StateLayout:
    return StateLayout(
        zero_stage(engine_config),
        num_ranks,
        student_dtype(engine_config),
        accumulation_dtype(engine_config),
        offloads_optimizer(engine_config),
    )


def with_micro_batch(engine_config: dict, micro_batch_size: int, num_ranks: int) -> dict:
    """DeepSpeed's JSON for an engine that starts with this micro-batch."""
    return engine_config | {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": engine_config["train_batch_size"] // (micro_batch_size * num_ranks),
    }


def fit_micro_batch(policy: MicroBatchPolicy, engine: TrainingEngine, prefetcher: BatchPrefetcher) -> dict[str, int]:
    """After a resize: the micro-batch for the current widths, from the next step on. Returns what the event's line
    tells.

    Nothing to tell ({}) unless the run lets it grow.
    """
    if not policy.config.run.grow_micro_batch:
        return {}
    before, steps_before = engine.micro_batch_size, engine.accumulation_steps
    after = policy(engine.module.widths)
    if after != before:
        engine.set_micro_batch_size(after)
        prefetcher.set_micro_batch_size(after)
    return {
        "micro_batch_size_before": before,
        "micro_batch_size_after": after,
        "gradient_accumulation_steps_before": steps_before,
        "gradient_accumulation_steps_after": engine.accumulation_steps,
    }
