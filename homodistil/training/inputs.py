"""Inputs of a run: teacher, tokenizer and corpus, found and validated before training."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from homodistil.config.schema import RunConfig
from homodistil.data.batch import Batch
from homodistil.data.loader import BatchLoader, EvenlySpread, fixed_batches, fixed_samples
from homodistil.data.prefetch import BatchPrefetcher
from homodistil.data.prepare.corpus import Corpus, prepare_corpus
from homodistil.data.prepare.integrity import BackgroundCheck
from homodistil.data.prepare.label_choice import label_rule
from homodistil.data.rows import Rows, TextOutputs
from homodistil.data.sources.teachers import is_cached_teacher
from homodistil.data.task import TASKS
from homodistil.data.vocabulary.choice import ALL
from homodistil.distill.teacher import load_config, load_model, load_tokenizer
from homodistil.distributed import groups, ranks, watchdog
from homodistil.errors import UserError
from homodistil.evaluation.vectors import MAX_TEXTS
from homodistil.models import family_of
from homodistil.models.checkpoint_files import local_folder
from homodistil.models.classifier import LogitKind, logit_kind
from homodistil.models.family_heads import HeadKind
from homodistil.models.sentence_head import SentenceHead, load_sentence_head
from homodistil.models.sentence_modules import PoolingMode, SentenceModules
from homodistil.training.embedder import sentence_modules_of
from homodistil.training.fingerprints import (
    CORPUS,
    Fingerprints,
    begun_with,
    check_same,
    given_fingerprints,
)
from homodistil.training.resolve import resolve_run
from homodistil.training.run_summary import run_summary
from homodistil.training.settle import settle
from homodistil.training.teacher_checks import cache_dir, check_teacher
from homodistil.training.teacher_vocabulary import (
    GivenTeacher,
    VocabularyCut,
    cut_teacher,
    read_cut,
)

# Held-out masks are the same for every run and seed, so that results can be compared.
HELDOUT_SEED = 20230501
PERIODIC_EVALUATION_SEQUENCES = 512


@dataclass(frozen=True)
class RunInputs:
    """Everything that is the same for correction, distillation and controls."""

    teacher: str
    """Folder or hub name of the teacher (corrected, once it has been)."""
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    device: torch.device
    allow_pickle: bool = False
    """Whether the teacher's weights may be a pickle."""
    fingerprints: Fingerprints = field(default_factory=dict)
    """Fingerprints of all inputs; checkpoints keep them."""
    begun_with: Fingerprints | None = None
    """Fingerprints in the checkpoint to resume from; None: there is no checkpoint."""
    corpus_check: BackgroundCheck | None = None
    """Check of a large corpus in the background; None: nothing is being checked."""
    window: int | None = None
    """Of the teacher's layers that have one (`ModelFamily.window`)."""
    head: HeadKind = "lm"
    """What models have behind their backbone (`Task.head`)."""
    sentence_modules: SentenceModules | None = None
    """Of a teacher whose vectors of texts are learned (task embedding)."""
    vocabulary: VocabularyCut | None = None
    """What was cut of the teacher's vocabulary before anything else; None: nothing."""
    outputs: TextOutputs | None = None
    """The teacher's pooled states of every text (teacher.outputs=stored); None: it runs in each step."""

    @property
    def with_head(self) -> bool:
        """Whether models have a language-modelling head."""
        return self.head == "lm"

    @property
    def has_single_texts(self) -> bool:
        """Whether every block holds one text or pair (`Task.has_single_texts`)."""
        return self.sentence_modules is not None or self.head == "classifier"

    @property
    def pooling(self) -> PoolingMode | None:
        """How vectors of texts are pooled (task embedding)."""
        return self.sentence_modules and self.sentence_modules.pooling

    @functools.cached_property
    def logits(self) -> LogitKind | None:
        """What the logits of the teacher's labels are (task scores)."""
        return logit_kind(load_config(self.teacher)) if self.head == "classifier" else None

    def sentence_head(self) -> SentenceHead | None:
        """The modules behind the teacher's backbone, loaded anew, on the CPU (task embedding). Raises `UserError`."""
        return self.sentence_modules and load_sentence_head(self.sentence_modules, "teacher.name")

    def require_intact(self) -> None:
        """Wait until the corpus is known to be what was prepared. Every rank calls it before it keeps what it trained.

        Raises:
            UserError: on every rank, if it is damaged.
        """
        if self.corpus_check is not None and not self.corpus_check.is_settled:
            with watchdog.long_phase("checking the corpus"):
                groups.raise_any(self.corpus_check.problem())
            self.corpus_check.is_settled = True

    def prefetcher(self, config: RunConfig, seed: int) -> BatchPrefetcher:
        return BatchPrefetcher(self.loader(config, seed), self.device)

    def loader(self, config: RunConfig, seed: int) -> BatchLoader:
        """This rank's share of the training blocks."""
        return BatchLoader(
            self.corpus.train,
            self.tokenizer,
            config.data,
            seed,
            config.train.global_batch_size,
            config.train.micro_batch_size,
            ranks.rank(),
            ranks.world_size(),
            self.window,
            config.loss.skip_first_tokens,
            self.outputs and self.outputs.train,
            self.corpus.labels and self.corpus.labels.train,
        )

    def heldout(self, config: RunConfig, limit: int | None = None, batch_size: int | None = None) -> Iterator[Batch]:
        """This rank's share of the held-out blocks (the first `limit` of all), with fixed masks; of single texts
        `limit` or MAX_TEXTS, spread evenly."""
        batches = fixed_batches(
            self._spread(self.corpus.heldout, limit),
            self.tokenizer,
            config.data,
            HELDOUT_SEED,
            batch_size or config.train.eval_batch_size,
            ranks.rank(),
            ranks.world_size(),
            limit,
            self.window,
            config.loss.skip_first_tokens,
            self.outputs and self._spread(self.outputs.heldout, limit),
            self.corpus.labels and self._spread(self.corpus.labels.heldout, limit),
        )
        return watchdog.each("evaluating", batches)

    def heldout_positions(self, config: RunConfig, limit: int | None = None) -> tuple[np.ndarray, int]:
        """Of held-out single texts: the number of each in this rank's share, int64 (texts,), and how many there are."""
        total = len(self._spread(self.corpus.heldout, limit))
        shares = fixed_samples(total, config.train.eval_batch_size, ranks.rank(), ranks.world_size())
        return np.concatenate([np.empty(0, dtype=np.int64), *shares]), total

    def heldout_labels(self, limit: int | None = None) -> Tensor | None:
        """Labels of all held-out texts that are looked at, fp32 (texts, W); None: labels are not read."""
        if self.corpus.labels is None:
            return None
        rows = self._spread(self.corpus.labels.heldout, limit)
        return torch.from_numpy(rows[np.arange(len(rows))])

    def _spread(self, heldout: Rows, limit: int | None) -> Rows | EvenlySpread:
        """Those of held-out rows, blocks or what there is of their texts, that are looked at."""
        if not self.has_single_texts:
            return heldout
        return EvenlySpread(heldout, MAX_TEXTS if limit is None else min(limit, MAX_TEXTS))


def _is_cached_here(config: RunConfig) -> bool:
    name = config.teacher.name
    return is_cached_teacher(name) or local_folder(name, "teacher.name") is not None


def _say_on_first_rank(line: str) -> None:
    if ranks.rank() == 0:
        print(line, flush=True)


def prepare_inputs(
    config: RunConfig, device: torch.device, run_folders: Sequence[Path] = (), students: Sequence[RunConfig] = ()
) -> RunInputs:
    """Teacher folder, tokenizer and corpus: fetched and prepared on first use, by one rank a cache.

    Args:
        run_folders: a run that resumes from a checkpoint in one of them must have what it began with.
        students: those to be made of the teacher, instead of the one of `config` (config/students.py).
    """
    before = ranks.on_rank_zero(lambda: begun_with(run_folders))

    def accept(**now: str) -> Fingerprints:
        check_same(next(iter(run_folders), Path()), before, now)
        return now

    leaders = groups.cache_leaders(cache_dir(config))
    # A hub's files lie in the hub client's own cache, which need not be shared where ours is.
    readers = leaders if _is_cached_here(config) else groups.machine_groups()
    wanted = students or [config]
    folder, task = groups.once(
        readers, lambda: (check_teacher(wanted[0], _say_on_first_rank), wanted[0].data.task)
    )  # the task depends on weights, which one rank has read
    teacher_config, head = load_config(folder), TASKS[task].head
    for one in (config, *students):
        settle(one, teacher_config, head == "lm", folder)
    modules = sentence_modules_of(wanted[0].data, folder)
    tokenizer, vocabulary = load_tokenizer(folder, teacher_config, task), None
    of_given = functools.partial(given_fingerprints, config.data, folder, tokenizer, modules)
    fingerprints = groups.once(leaders, lambda: accept(**of_given()))
    if config.student.vocab != ALL:
        given = GivenTeacher(folder, tokenizer, modules, head)
        folder = groups.once(leaders, lambda: cut_teacher(config, given, accept))
        teacher_config, vocabulary = load_config(folder), read_cut(folder)
        modules, tokenizer = sentence_modules_of(wanted[0].data, folder), load_tokenizer(folder, teacher_config, task)
        fingerprints = {**fingerprints, **accept(**vocabulary.fingerprints)}
        _say_on_first_rank(f"vocabulary: {vocabulary} ({folder})")
    for one in wanted:
        resolved = resolve_run(one, teacher_config)
        one.train.lr, one.is_settled = resolved.learning_rate, True
        for subject, text in run_summary(resolved).items():
            _say_on_first_rank(f"{subject}: {text}" if len(wanted) == 1 else f"{one.run.name}: {subject}: {text}")
    # What the others get of the corpus are the names of the files, which they map for themselves.
    labels = label_rule(config.data, teacher_config)
    prepare = functools.partial(prepare_corpus, config.data, tokenizer, lambda now: accept(corpus=now), labels=labels)
    corpus = Corpus.named(groups.once(leaders, lambda: prepare().names()))
    check = BackgroundCheck(corpus.train.path.parent if leaders[ranks.rank()] == ranks.rank() else None)
    if corpus.fingerprint != ranks.on_rank_zero(lambda: corpus.fingerprint):
        raise UserError(
            f"data.sources: rank {ranks.rank()} found another text than rank 0; give every machine the same files "
            f"(a shared folder, or data.sources named one by one where `embedded` depends on npm being there)"
        )
    if len(corpus.train) < config.train.global_batch_size:
        raise UserError(
            f"data.sources: {len(corpus.train)} training blocks of {config.data.seq_len} tokens, fewer than one "
            f"train.global_batch_size ({config.train.global_batch_size}); give more text, a smaller batch, or "
            f"a smaller data.heldout_fraction ({config.data.heldout_fraction:g}: {len(corpus.heldout)} blocks held out)"
        )
    if ranks.rank() == 0:
        print(f"teacher: {config.teacher.name}; corpus: {corpus.description}", flush=True)
    fingerprints = {**fingerprints, CORPUS: corpus.fingerprint}
    more = fingerprints, before, check, window_of(teacher_config), head, modules, vocabulary
    return RunInputs(folder, tokenizer, corpus, device, config.teacher.allow_pickle, *more)


def window_of(teacher_config) -> int | None:
    """`RunInputs.window` of a teacher with this configuration."""
    return family_of(teacher_config.model_type).window(teacher_config)


def teacher_copy(run_inputs: RunInputs, dtype: torch.dtype, dropout: float | None = None):
    """A fresh copy of the teacher's model, in host memory."""
    return load_model(run_inputs.teacher, dtype, dropout, run_inputs.allow_pickle, run_inputs.head)
