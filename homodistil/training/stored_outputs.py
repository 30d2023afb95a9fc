"""teacher.outputs=stored: the teacher's pooled state of every text, computed once and kept beside the corpus.

    run_inputs = with_stored_outputs(config, dtype, run_inputs)     # every rank; computes what is missing
    prepare_outputs(config, dtype, run_inputs, task, tasks)         # ahead of a run, one of several workers

The files are named by the content of all they depend on: text, tokenizer, teacher, pooling, precision. Students and
seeds do not count.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

import homodistil
from homodistil.config.schema import RunConfig
from homodistil.data.cache import build_once, set_aside, workspace
from homodistil.data.prepare.build_shards import Preparation
from homodistil.data.rows import OutputRows, Rows, TextOutputs
from homodistil.data.task import BatchMaker, task_of
from homodistil.distill.build_teacher import build_teacher
from homodistil.distill.stored_teacher import compute_outputs
from homodistil.distill.teacher import Teacher
from homodistil.distributed import groups, ranks, watchdog
from homodistil.metrics.progress import doing
from homodistil.training.fingerprints import teacher_fingerprint
from homodistil.training.inputs import RunInputs, teacher_copy
from homodistil.training.output_shards import OutputShard, OutputShards
from homodistil.training.teacher_checks import cache_dir

SHARD_TEXTS = 4096
"""Most texts of a shard, which is repeated after a kill: seconds on a GPU, a minute on a few cores."""
_BYTES_PER_TOKEN = 4
"""Of English text, about: data.shard_bytes counts bytes."""
_VERSION = 1
"""Raise it when a change of the code changes the rows."""


def with_stored_outputs(config: RunConfig, dtype: torch.dtype, run_inputs: RunInputs) -> RunInputs:
    """`run_inputs` with the outputs that the config wants stored. What is missing is computed by all ranks.

    Every rank calls it, while none holds anything on its device.

    Args:
        dtype: of the teacher.

    Raises:
        UserError: on every rank, if a file cannot be read or written, or rows are to be computed of a damaged corpus.
    """
    leaders, what = groups.cache_leaders(cache_dir(config)), OutputShards.what
    with watchdog.long_phase(what), doing(what):
        key = groups.once(leaders, lambda: outputs_key(config, dtype, run_inputs))
        order = _Order(config, dtype, run_inputs, key)
        groups.once(leaders, order.take_away_damaged)
    if any(ranks.gather(not order.target.exists())):
        run_inputs.require_intact()  # or rows of damaged text would be kept as those of the text
        with watchdog.long_phase(what), doing(what):
            groups.once(list(range(ranks.world_size())), order.compute)
            groups.once(leaders, order.finish)
    return dataclasses.replace(run_inputs, outputs=order.outputs())


def prepare_outputs(config: RunConfig, dtype: torch.dtype, run_inputs: RunInputs, task: int, tasks: int) -> str:
    """The work of one of several workers: every `tasks`-th shard, beginning with number `task`.

    Returns:
        A line on what there is now.

    Raises:
        UserError: a file cannot be read or written.
    """
    order = _Order(config, dtype, run_inputs, outputs_key(config, dtype, run_inputs))
    order.take_away_damaged()
    order.compute(task, tasks)
    left = order.num_left()
    if left:
        return (
            f"task {task} of {tasks} is done; {left} shards of the teacher's outputs are left to other tasks; the last "
            f"one to finish merges them"
        )
    order.finish()
    return f"teacher's outputs: {order.target}"


def computed_outputs(config: RunConfig, dtype: torch.dtype, run_inputs: RunInputs) -> TextOutputs:
    """The outputs in memory, of a few texts that are in no corpus (a trial step)."""
    work = OutputWork(config, dtype, run_inputs)
    train, heldout = (work.compute(OutputShard(split, 0, num_texts)) for split, num_texts in work.num_texts.items())
    return TextOutputs(train, heldout)


def outputs_key(config: RunConfig, dtype: torch.dtype, run_inputs: RunInputs) -> str:
    """Content of everything that the rows depend on."""
    content = (
        *(_VERSION, run_inputs.corpus.fingerprint, teacher_fingerprint(run_inputs.teacher)),
        *(run_inputs.pooling, run_inputs.head, str(dtype), config.teacher.runtime),
    )
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


class OutputWork:
    """What a shard is made of; the teacher is loaded when the first one is made.

    Args:
        dtype: of the teacher.
    """

    def __init__(self, config: RunConfig, dtype: torch.dtype, run_inputs: RunInputs) -> None:
        self._config, self._dtype, self._run_inputs = config, dtype, run_inputs
        corpus = run_inputs.corpus
        self._rows: dict[str, Rows] = {"train": corpus.train, "heldout": corpus.heldout}
        self.num_texts = {split: len(rows) for split, rows in self._rows.items()}
        self._to_batch: BatchMaker = task_of(config.data).batch_maker(
            run_inputs.tokenizer, config.data, config.train.seed, run_inputs.window
        )

    def compute(self, shard: OutputShard) -> np.ndarray:
        """fp32 (texts, D)."""
        return self._of(shard.split, np.arange(shard.first, shard.end))

    def neighbours_matter(self) -> float:
        """By how much a text's row may differ with the texts beside it and with the number of them; 0: not at all."""
        size = self._config.train.micro_batch_size
        samples = np.arange(min(size, self.num_texts["train"]))
        whole, some = self._of("train", samples), samples[::-1][: -(-len(samples) // 2)]
        fewer = compute_outputs(self._teacher, self._to_batch, self._rows["train"], some, len(some))
        return float(np.abs(whole[some] - fewer).max())

    def _of(self, split: str, samples: np.ndarray) -> np.ndarray:
        size = self._config.train.micro_batch_size
        return compute_outputs(self._teacher, self._to_batch, self._rows[split], samples, size)

    @functools.cached_property
    def _teacher(self) -> Teacher:
        run_inputs, dtype = self._run_inputs, self._dtype
        model = teacher_copy(run_inputs, dtype)
        return build_teacher(model, self._config.teacher, run_inputs.device, dtype, run_inputs.sentence_head())

    def forget(self) -> None:
        """Free the teacher."""
        self.__dict__.pop("_teacher", None)
        if self._run_inputs.device.type == "cuda":
            torch.cuda.empty_cache()


class _Order:
    """A request for the files of a teacher's outputs.

    Args:
        key: of `outputs_key`.
    """

    def __init__(self, config: RunConfig, dtype: torch.dtype, run_inputs: RunInputs, key: str) -> None:
        self._work, self._shard_texts = OutputWork(config, dtype, run_inputs), shard_texts(config)
        self._facts = _facts(config, dtype, run_inputs)
        self._maker = OutputShards(self._work.num_texts, self._shard_texts, self._work.compute)
        self.target = cache_dir(config) / "teacher_outputs" / key
        parts = cache_dir(config) / "parts" / f"outputs-{key}-{self._shard_texts}"
        self._preparation = Preparation(parts, self._maker, self.target.exists)

    def take_away_damaged(self) -> None:
        """Delete files that are not what was written, with a warning."""
        if self.target.exists() and self._maker.whole_damage(self.target):
            with workspace(self.target):
                if self.target.exists() and (reason := self._maker.whole_damage(self.target)):
                    set_aside(self.target, reason)

    def compute(self, task: int = 0, tasks: int = 1) -> None:
        """Unless the files are there, make every `tasks`-th shard that is missing; those that others are making are
        waited for."""
        if self.target.exists():
            return
        numbers = range(len(self._maker.sizes))[task::tasks]
        self._preparation.make(numbers, 0)
        if "_teacher" in self._work.__dict__:
            _tell(self._work.neighbours_matter())
        self._work.forget()

    def num_left(self) -> int:
        return 0 if self.target.exists() else len(self._preparation.unfinished())

    def finish(self) -> None:
        """Merge the shards, unless somebody has."""

        def build(folder: Path) -> None:
            self._maker.merge(folder, self._preparation.whole(0), self._facts)

        if not self.target.exists():
            build_once(self.target, build)
            self._preparation.give_up()
        self._work.forget()

    def outputs(self) -> TextOutputs:
        return TextOutputs(*(OutputRows(self.target / f"{split}.npy") for split in self._maker.num_texts))


def shard_texts(config: RunConfig) -> int:
    """Texts of a shard: as many as data.shard_bytes holds, and SHARD_TEXTS at most."""
    return max(1, min(SHARD_TEXTS, config.data.shard_bytes // (_BYTES_PER_TOKEN * config.data.seq_len)))


def _facts(config: RunConfig, dtype: torch.dtype, run_inputs: RunInputs) -> dict[str, object]:
    """For whoever looks at the files; nothing reads it."""
    return {
        "rows": f"last hidden states, {run_inputs.pooling or 'as the head of labels reads them'}",
        "corpus": run_inputs.corpus.fingerprint,
        "teacher_dtype": str(dtype).removeprefix("torch."),
        "texts_of_a_pass": config.train.micro_batch_size,
        "device": run_inputs.device.type,
        "versions": {"homodistil": homodistil.__version__}
        | {name: metadata.version(name) for name in ("torch", "transformers")},
    }


def _tell(difference: float) -> None:
    if difference and ranks.rank() == 0:
        print(
            f"note: on this device a text's row depends on the texts beside it in a pass (by up to {difference:.1e}): "
            f"training with teacher.outputs=stored is not bitwise the run with the teacher live",
            flush=True,
        )
