"""The product's own training step for a benchmark: a random teacher of a given shape, text, DeepSpeed engine, Trainer.

Weights and words are random (speed does not depend on them); everything else is what `launcher/train.py` builds from a
recipe, an engine's JSON and overrides. Needs no network.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch

from benchmarks.harness.shapes import Plan, Shape
from homodistil.config import command_line
from homodistil.config.schema import RunConfig
from homodistil.distributed import ranks
from homodistil.engine.build import load_engine_config, resolve_engine_config
from homodistil.evaluation.gap_probe import PROBE_SEQUENCES
from homodistil.training.inputs import prepare_inputs
from homodistil.training.run import DistillationRun
from homodistil.training.step_logger import run_recorder
from homodistil.training.trainer import Trainer, TrainState

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_BLOCKS_PER_DOCUMENT = 3


def run_config(shape: Shape, plan: Plan, work: Path, quick: bool, num_ranks: int, extra: list[str]) -> RunConfig:
    """The recipe with the batch of this device and the schedule compressed to `plan`; `extra` overrides come last."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, micro_batch = shape.batch["quick" if quick and device == "cpu" else device]
    overrides = [f"recipe={shape.recipe}", *shape.overrides]
    overrides += [f"teacher.name={work / 'teacher'}", f"data.sources=[{work / 'text.txt'}]"]
    overrides += [f"data.cache_dir={work / 'cache'}", "data.text_documents=paragraph", "teacher.correction_steps=0"]
    # The probe of the gap is what is held out: with all of a run's it would take longer than the steps of so short a
    # schedule.
    heldout = -(-min(PROBE_SEQUENCES, micro_batch * num_ranks) // _BLOCKS_PER_DOCUMENT)
    overrides += [f"data.heldout_fraction={heldout / _num_documents(batch * num_ranks)}"]
    overrides += [f"data.workers={4 if device == 'cuda' else 0}"]
    overrides += [f"train.steps={plan.num_steps}", f"train.global_batch_size={batch * num_ranks}"]
    overrides += [f"train.micro_batch_size={micro_batch}", f"pruning.interval_steps={plan.interval}"]
    overrides += [f"pruning.start_fraction={plan.settle / plan.num_steps}"]
    overrides += [f"pruning.end_fraction={plan.end_step / plan.num_steps}", "pruning.max_event_fraction=0.5"]
    overrides += ["pruning.compensation=none"]  # what a step costs at a width, not how it got there
    return command_line.parse([*overrides, *extra])


def build_trainer(shape: Shape, config: RunConfig, engine_json: Path, work: Path, device: torch.device) -> Trainer:
    """As a run of homodistil builds it. Every rank calls it."""
    ranks.on_rank_zero(lambda: write_inputs(shape, config, work))
    engine_config = resolve_engine_config(load_engine_config(engine_json), config.train, ranks.world_size())
    run = DistillationRun(config, engine_config, prepare_inputs(config, device), work / "run", "benchmark")
    return run.build_trainer(run_recorder(work / "run", config, 0), TrainState())


def _num_documents(global_batch: int) -> int:
    """Enough for twice as many blocks as a global batch has sequences."""
    return -(-max(2 * global_batch, 64) // _BLOCKS_PER_DOCUMENT) + 16


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
    word_tokenizer(shape.vocabulary).save_pretrained(work / "teacher")
    _write_text(work / "text.txt", shape.vocabulary, config)


def word_tokenizer(vocabulary: int):
    """A word is a token: w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{i}" for i in range(vocabulary - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


def _write_text(path: Path, vocabulary: int, config: RunConfig) -> None:
    """Random words, a paragraph of about three blocks per document."""
    generator, length = random.Random(0), _BLOCKS_PER_DOCUMENT * config.data.seq_len
    words = [f"w{i}" for i in range(vocabulary - len(SPECIAL))]
    count = _num_documents(config.train.global_batch_size)
    path.write_text("\n\n".join(" ".join(generator.choices(words, k=length)) for _ in range(count)) + "\n")
