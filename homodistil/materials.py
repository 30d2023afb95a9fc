"""What a run starts from: teacher folder, tokenizer and corpus, found and checked before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from homodistil import nodes, ranks, watch
from homodistil.config import RunConfig
from homodistil.data.assets import teacher_folder
from homodistil.data.corpus import Corpus, prepare_corpus
from homodistil.data.loader import BatchLoader, fixed_batches
from homodistil.data.masking import Batch
from homodistil.distill.counterpart import check_student
from homodistil.distill.relations import check_relations
from homodistil.distill.teacher import has_mlm_head, load_config, load_model, load_tokenizer
from homodistil.errors import UserError
from homodistil.feed import Feed
from homodistil.models import family_of
from homodistil.pruning.scheduler import width_schedule
from homodistil.pruning.target import student_widths

# Held-out masks are the same for every run and seed, so that results can be compared.
HELDOUT_SEED = 20230501
PERIODIC_EVALUATION_SEQUENCES = 512


@dataclass(frozen=True)
class Materials:
    """Everything that is the same for correction, distillation and controls."""

    teacher: str
    """Folder or hub name of the teacher (corrected, once it has been)."""
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    device: torch.device
    allow_pickle: bool = False
    """Whether the teacher's weights may be a pickle."""

    def feed(self, config: RunConfig, seed: int) -> Feed:
        return Feed(self.loader(config, seed), self.device)

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
        )

    def heldout(self, config: RunConfig, limit: int | None = None, batch_size: int | None = None) -> Iterator[Batch]:
        """This rank's share of the held-out blocks (the first `limit` of all), with fixed masks."""
        batches = fixed_batches(
            self.corpus.heldout,
            self.tokenizer,
            config.data,
            HELDOUT_SEED,
            batch_size or config.train.eval_batch_size,
            ranks.rank(),
            ranks.world_size(),
            limit,
        )
        return watch.each("evaluating", batches)


def cache_dir(config: RunConfig) -> Path:
    return Path(config.data.cache_dir).expanduser()


def check_teacher(config: RunConfig) -> str:
    """Folder of the teacher, once everything about it that the config depends on is known to fit.

    Raises:
        UserError: missing, unsupported, a target it cannot be cut to, too few positions, no MLM head.
    """
    folder = config.teacher.name
    if folder.startswith("embedded:"):
        folder = str(teacher_folder(folder, cache_dir(config)))  # under a lock: one rank a machine fetches
    teacher = load_config(folder)
    family = family_of(teacher.model_type)
    with torch.device("meta"):
        widths = family.axis_table(family.empty_model(teacher)).widths
    check_student(config, teacher.num_hidden_layers)
    initial, target = student_widths(config.student, widths)
    schedule = width_schedule(config, widths, initial, target)
    on_the_way = [schedule.table[step] for step in sorted(getattr(schedule, "table", {}))]
    check_relations(config.loss, widths, [initial, *on_the_way])
    if config.data.seq_len > teacher.max_position_embeddings:
        raise UserError(
            f"data.seq_len: {config.data.seq_len} is above the teacher's max_position_embeddings "
            f"{teacher.max_position_embeddings}; choose 3 .. {teacher.max_position_embeddings}"
        )
    # Loads the weights, so that a damaged file is found now.
    has_head = has_mlm_head(folder, config.teacher.allow_pickle)
    if not has_head and not config.teacher.correction_steps and (config.loss.mlm > 0 or config.loss.kl > 0):
        raise UserError(
            f"teacher.name: {config.teacher.name!r} has no MLM head, so loss.mlm and loss.kl would teach noise; "
            f"set teacher.correction_steps (1000, say) to train one, or loss.mlm=0 loss.kl=0"
        )
    return folder


def _is_cached_here(config: RunConfig) -> bool:
    name = config.teacher.name
    return name.startswith("embedded:") or Path(name).expanduser().is_dir()


def gather(config: RunConfig, device: torch.device) -> Materials:
    """Teacher folder, tokenizer and corpus: fetched and prepared on first use, by one rank a cache."""
    leaders = nodes.cache_leaders(cache_dir(config))
    # A hub's files lie in the hub client's own cache, which need not be shared where ours is.
    folder = nodes.once(leaders if _is_cached_here(config) else nodes.machine_leaders(), lambda: check_teacher(config))
    tokenizer = load_tokenizer(folder, load_config(folder).vocab_size)
    # What the others get are the names of the files, which they map for themselves.
    corpus = Corpus.named(nodes.once(leaders, lambda: prepare_corpus(config.data, tokenizer).names()))
    if corpus.fingerprint != ranks.on_first_rank(lambda: corpus.fingerprint):
        raise UserError(
            f"data.sources: rank {ranks.rank()} found another text than rank 0; give every machine the same files "
            f"(a shared folder, or data.sources named one by one where `embedded` depends on npm being there)"
        )
    if len(corpus.train) < config.train.global_batch_size:
        raise UserError(
            f"data.sources: {len(corpus.train)} training blocks of {config.data.seq_len} tokens, fewer than one "
            f"train.global_batch_size ({config.train.global_batch_size}); give more text or a smaller batch"
        )
    if ranks.rank() == 0:
        print(f"teacher: {config.teacher.name}; corpus: {corpus.description}", flush=True)
    return Materials(folder, tokenizer, corpus, device, config.teacher.allow_pickle)


def teacher_copy(materials: Materials, dtype: torch.dtype, dropout: float | None = None):
    """A fresh copy of the teacher's model, in host memory."""
    return load_model(materials.teacher, dtype, dropout, materials.allow_pickle)
