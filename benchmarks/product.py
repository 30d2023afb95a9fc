"""The product's own training step for a benchmark: a random teacher of a given shape, text, DeepSpeed engine, Trainer.

Weights and words are random (speed does not depend on them); everything else is what `launcher/train.py` builds from a
recipe, an engine's JSON and overrides. Needs no network.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from shapes import Plan, Shape

from homodistil.config import command_line
from homodistil.config.schema import RunConfig
from homodistil.distributed import ranks
from homodistil.engine.build import load_engine_config, resolve_engine_config
from homodistil.evaluation import gap_probe
from homodistil.training import inputs
from homodistil.training import run as training_run
from homodistil.training.run import DistillationRun
from homodistil.training.step_logger import run_recorder
from homodistil.training.trainer import Trainer, TrainState

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def run_config(shape: Shape, plan: Plan, work: Path, quick: bool, num_ranks: int, extra: list[str]) -> RunConfig:
    """The recipe with the batch of this device and the schedule compressed to `plan`; `extra` overrides come last."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, micro_batch = shape.batch["quick" if quick and device == "cpu" else device]
    overrides = [f"recipe={shape.recipe}", *shape.overrides]
    overrides += [f"teacher.name={work / 'teacher'}", f"data.sources=[{work / 'text.txt'}]"]
    overrides += [f"data.cache_dir={work / 'cache'}", "data.text_documents=paragraph", "teacher.correction_steps=0"]
    overrides += [f"data.workers={4 if device == 'cuda' else 0}", f"data.heldout_fraction={0.1}"]
    overrides += [f"train.steps={plan.num_steps}", f"train.global_batch_size={batch * num_ranks}"]
    overrides += [f"train.micro_batch_size={micro_batch}", f"pruning.interval_steps={plan.interval}"]
    overrides += [f"pruning.start_fraction={plan.settle / plan.num_steps}"]
    overrides += [f"pruning.end_fraction={plan.end_step / plan.num_steps}", "pruning.max_event_fraction=0.5"]
    overrides += ["pruning.compensation=none"]  # what a step costs at a width, not how it got there
    return command_line.parse([*overrides, *extra])


def build_trainer(shape: Shape, config: RunConfig, engine_json: Path, work: Path, device: torch.device) -> Trainer:
    """As `job.run` builds it. Every rank calls it."""
    ranks.on_rank_zero(lambda: write_inputs(shape, config, work))
    engine_config = resolve_engine_config(load_engine_config(engine_json), config.train, ranks.world_size())
    found = inputs.prepare_inputs(config, device)
    # A run's probe of the gap at every event would take longer than all steps of so short a schedule.
    training_run.PROBE_SEQUENCES = probe_sequences(config, ranks.world_size())
    run = DistillationRun(config, engine_config, found, work / "run", "benchmark")
    return run.build_trainer(run_recorder(work / "run", config, 0), TrainState())


def probe_sequences(config: RunConfig, num_ranks: int) -> int:
    """A micro-batch a rank, at most what a run takes."""
    return min(gap_probe.PROBE_SEQUENCES, config.train.micro_batch_size * num_ranks)


def write_inputs(shape: Shape, config: RunConfig, work: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.ffn,
            vocab_size=shape.vocabulary,
        )
    )
    model.save_pretrained(work / "teacher")
    _tokenizer(shape.vocabulary).save_pretrained(work / "teacher")
    _write_text(work / "text.txt", shape.vocabulary, config)


def _tokenizer(vocabulary: int):
    """A word is a token: w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*_SPECIAL, *(f"w{i}" for i in range(vocabulary - len(_SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


def _write_text(path: Path, vocabulary: int, config: RunConfig) -> None:
    """Random words: twice as many blocks as a global batch has sequences, in paragraphs of about three blocks."""
    generator, num_blocks = random.Random(0), max(2 * config.train.global_batch_size, 64)
    length = 3 * config.data.seq_len
    words = [f"w{i}" for i in range(vocabulary - len(_SPECIAL))]
    paragraphs = (" ".join(generator.choices(words, k=length)) for _ in range(-(-num_blocks // 3) + 16))
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
