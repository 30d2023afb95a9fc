"""Sections of the run config about the inputs: teacher, student, data. See `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from homodistil.config.option import (
    COMPUTED,
    CORRECTION,
    KEY,
    MEASUREMENT,
    MEASUREMENT_INPUTS,
    MILESTONE,
    SAME,
    SEED,
    SHARED_JOB,
    STEPS,
    STUDENT,
    option,
)


@dataclass(kw_only=True)
class TeacherConfig:
    """teacher: the big model, and its correction on the corpus"""

    name: str = option(
        "embedded:bert-tiny",
        limited_by="data/sources, models/config_file.py: a BERT that can be read",
        resume="content",
        students="shared",
        derived=SAME,
    )
    """Folder, hub name (bert-base-uncased), a Llama's FILE.gguf, or packaged model: embedded:bert-tiny,
    embedded:minilm-l6, embedded:smollm2-135m."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", resume="free", students="shared", derived=SAME
    )
    """Inference precision. auto: float16 on GPU; on CPU the student's precision. float16 needs a GPU."""
    correction_steps: int = option(
        0, low=0, high=STEPS, resume="fixed", students="shared", derived={MEASUREMENT: 0, MEASUREMENT_INPUTS: 1}
    )
    """Optimizer steps of plain MLM on the corpus before distilling (0 = none). The result is cached by content."""
    correction_lr: float = option(1e-3, low=0, high=10, exclude="low", resume="fixed", students="shared", derived=SAME)
    """Peak learning rate of the correction (> 0)."""
    correction_seed: int = option(0, low=0, high=SEED, resume="fixed", students="shared", derived=SAME)
    """Data order and masking of the correction (>= 0). train.seed has no part in it: all seeds share a teacher."""
    allow_pickle: bool = option(False, resume="free", students="shared", derived=SAME)
    """Accept a teacher that has no .safetensors, only pickled weights; they are still read with weights_only."""
    runtime: Literal["torch", "compile", "deepspeed"] = option("torch", resume="fixed", students="shared", derived=SAME)
    """How the frozen teacher runs: as it is, under torch.compile, or under deepspeed.init_inference."""
    lock_step: bool = option(True, resume="fixed", students="shared", derived={STUDENT: False, SHARED_JOB: False})
    """With runtime=torch: each teacher layer runs just before the student's, and is freed once compared: less memory,
    the same numbers. false: the whole teacher first."""
    own_stream: bool = option(False, resume="fixed", students="shared", derived=SAME)
    """GPU: run the teacher on a CUDA stream of its own, beside the student's forward (leaves lock-step)."""
    shard: bool = option(False, resume="free", students="shared", derived=SAME)
    """Share the teacher's layers out over the ranks, for one that does not fit a GPU: each layer is gathered to run."""

    @property
    def in_lock_step(self) -> bool:
        return self.lock_step and self.runtime == "torch" and not self.own_stream


@dataclass(kw_only=True)
class StudentConfig:
    """student: the size to reach"""

    preset: Literal[
        "custom", "teacher", "quickstart", "homobert-base", "homobert-small", "homobert-xsmall", "homobert-tiny"
    ] = option("custom", resume="fixed", students="own", derived={MILESTONE: "custom"})
    """Target size by name; custom: hidden_size, intermediate_size and num_attention_heads, all set; teacher: the
    teacher's own widths. A field that is set wins over the preset."""
    size: float | None = option(
        None, low=0, high=1, exclude="low", resume="fixed", students="own", derived={MILESTONE: None}
    )
    """Target size as a fraction of the teacher's parameters, instead of the sizes one by one: a stock shape with all
    widths in proportion is chosen, and shown before the run."""
    parameters: float | None = option(
        None, low=0, high=1e9, exclude="low", resume="fixed", students="own", derived={MILESTONE: None}
    )
    """The same in millions of parameters (70: 70 M)."""
    init: Literal["teacher", "random"] = option("teacher", resume="fixed", students="own", derived=SAME)
    """What the student starts from: teacher = its copy, then pruned; random = fresh weights at the target size."""
    num_hidden_layers: int | None = option(
        None,
        limited_by="layer_map.py: a divisor of the teacher's",
        resume="fixed",
        students="own",
        derived=SAME,
    )
    """Layers of the student (None: as many as the teacher). Student layer m is compared with teacher layer
    (m + 1) x N / M - 1, and starts as a copy of the teacher layer that init_layers says."""
    init_layers: list[int] = option(
        [],
        limited_by="layer_map.py: layers of the teacher",
        resume="fixed",
        students="own",
        derived=SAME,
    )
    """Teacher layers that a shallower student starts from, ascending, counted from 0; empty: every (N / M)-th."""
    hidden_size: int | None = option(
        None,
        limited_by="models/shapes.py: up to the teacher's",
        resume="fixed",
        students="own",
        derived={MILESTONE: COMPUTED},
    )
    """Target width of the residual stream (<= teacher's, divisible by num_attention_heads)."""
    intermediate_size: int | None = option(
        None,
        limited_by="models/shapes.py: up to the teacher's",
        resume="fixed",
        students="own",
        derived={MILESTONE: COMPUTED},
    )
    """Target neurons of each feed-forward block (<= teacher's)."""
    num_attention_heads: int | None = option(
        None,
        limited_by="models/shapes.py: up to the teacher's",
        resume="fixed",
        students="own",
        derived={MILESTONE: COMPUTED},
    )
    """Target heads of a layer (<= teacher's). Head size becomes hidden_size / num_attention_heads (<= teacher's), but
    rotary heads keep theirs."""
    num_key_value_heads: int | None = option(
        None,
        limited_by="models/shapes.py: up to the teacher's",
        resume="fixed",
        students="own",
        derived={MILESTONE: None},
    )
    """Target key/value heads of a layer where query heads share them (None: as many as num_attention_heads allows)."""
    dropout: float = option(0.0, low=0, high=1, exclude="high", resume="fixed", students="shared", derived=SAME)
    """Dropout probability while distilling, in [0, 1). The exported config keeps the teacher's values."""
    compile: bool = option(False, resume="fixed", students="own", derived=SAME)
    """torch.compile the student's layers: compiled anew after each resize event, so for long runs with few events."""


@dataclass(kw_only=True)
class DataConfig:
    """data: text, and how it becomes batches"""

    sources: list[str] | str = option(
        ["embedded"], limited_by="data/sources: what can be read", resume="content", students="shared", derived=SAME
    )
    """Files or folders (.txt, .jsonl, .parquet, Wikipedia dumps .xml; all but .parquet also .gz, .bz2, .xz, .zst), URLs
    of them (s3://, gs://, https://, ... through fsspec), hub data sets (wikipedia, bookcorpus, owner/name[:config]),
    or packaged text: embedded (all of it), embedded:wikipedia, embedded:bible, embedded:sotu, embedded:moby-dick."""
    text_documents: Literal["file", "paragraph"] = option("file", resume="fixed", students="shared", derived=SAME)
    """What one document is in .txt files: the whole file, or each block between blank lines."""
    text_column: str = option("text", limited_by="rules.py: not empty", resume="fixed", students="shared", derived=SAME)
    """Column that holds the text in .jsonl, .parquet and hub data sets."""
    seq_len: int = option(64, low=3, high=2**20, resume="fixed", students="shared", derived=SAME)
    """Tokens of a block, with [CLS] and [SEP] where the task has them (3 .. the teacher's max_position_embeddings)."""
    heldout_fraction: float = option(
        0.05, low=0, high=1, exclude="both", resume="fixed", students="shared", derived=SAME
    )
    """Fraction of documents kept for evaluation, in (0, 1). Split by document."""
    task: Literal["auto", "mlm", "causal"] = option("auto", resume="free", students="shared", derived=SAME)
    """What is predicted: masked tokens, or the next one. auto: what the teacher does."""
    mask_probability: float = option(
        0.15, low=0.0001, high=1, exclude="high", resume="fixed", students="shared", derived={CORRECTION: KEY}
    )
    """Task mlm: fraction of ordinary tokens to predict, in (0, 1); of these 80 % become [MASK], 10 % random, 10 % stay.
    """
    cache_dir: str = option(
        "~/.cache/homodistil", limited_by="values.py: a path", resume="free", students="shared", derived=SAME
    )
    """Where fetched assets, tokenised corpora and corrected teachers are kept."""
    workers: int = option(0, low=0, high=4096, resume="free", students="shared", derived=SAME)
    """Processes for tokenising, and data-loader workers a rank (0 = in the training process)."""
    shard_bytes: int = option(64_000_000, low=1, high=2**50, resume="free", students="shared", derived=SAME)
    """Text (bytes) that is prepared, and after a kill done again, at once. The blocks do not depend on it."""
    weights: list[float] = option([], low=0, high=1000, exclude="low", resume="fixed", students="shared", derived=SAME)
    """One a source: how often its training blocks come in an epoch (2: twice, 0.5: every second). Empty: once each."""
    boilerplate_filter: Literal["none", "gopher"] = option("none", resume="fixed", students="shared", derived=SAME)
    """Leave out documents that fail Gopher's rules on quality and repetition, as datatrove has them."""
    near_duplicates: Literal["none", "minhash"] = option("none", resume="fixed", students="shared", derived=SAME)
    """minhash: of documents that are nearly the same (Jaccard of word 5-grams about 0.8) only the first stays."""

    def __post_init__(self) -> None:
        if isinstance(self.sources, str):
            self.sources = [self.sources]
