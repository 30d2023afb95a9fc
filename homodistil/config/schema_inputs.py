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
    """teacher: the large model, and its correction on the corpus"""

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
    """Inference precision. auto: float16 on GPU, the student's precision on CPU. float16 needs a GPU."""
    correction_steps: int = option(
        0, low=0, high=STEPS, resume="fixed", students="shared", derived={MEASUREMENT: 0, MEASUREMENT_INPUTS: 1}
    )
    """Optimizer steps of plain language modelling on the corpus before distillation (0 = none). The result is cached by
    content."""
    correction_lr: float = option(1e-3, low=0, high=10, exclude="low", resume="fixed", students="shared", derived=SAME)
    """Peak learning rate of the correction (> 0). Unless it is set: by the teacher's width, as train.lr."""
    correction_seed: int = option(0, low=0, high=SEED, resume="fixed", students="shared", derived=SAME)
    """Seed of data order and masking of the correction (>= 0). Independent of train.seed: all seeds share a teacher."""
    allow_pickle: bool = option(False, resume="free", students="shared", derived=SAME)
    """Accept a teacher with pickled weights instead of .safetensors; they are loaded with weights_only."""
    plugins: list[str] = option(
        [], limited_by="config/plugins.py: can be imported", resume="free", students="shared", derived=SAME
    )
    """Python modules or .py files that register further model families. They are imported, and so executed, on every
    rank."""
    runtime: Literal["torch", "compile", "deepspeed"] = option("torch", resume="fixed", students="shared", derived=SAME)
    """How the frozen teacher runs: in eager mode (torch), with torch.compile, or with deepspeed.init_inference."""
    lock_step: bool = option(True, resume="fixed", students="shared", derived={STUDENT: False, SHARED_JOB: False})
    """With runtime=torch: run each teacher layer just before the student's layer, and free its output once compared.
    Needs less memory for the same numbers. false: run the whole teacher first."""
    own_stream: bool = option(False, resume="fixed", students="shared", derived=SAME)
    """GPU: run the teacher on a separate CUDA stream, in parallel to the student's forward (turns lock_step off)."""
    shard: bool = option(False, resume="free", students="shared", derived=SAME)
    """Shard the teacher's layers over the ranks, if it does not fit on a GPU; each layer is gathered before it runs."""
    outputs: Literal["live", "stored"] = option("live", resume="free", students="shared", derived={MEASUREMENT: "live"})
    """Tasks embedding and scores: where losses have the teacher's vectors or scores of texts from. live: the teacher
    runs in every step; stored: from files beside the corpus, computed once (docs/stored-outputs.md)."""

    @property
    def is_stored(self) -> bool:
        return self.outputs == "stored"

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
    widths in proportion is chosen, at the teacher's depth or num_hidden_layers, and shown before the run."""
    parameters: float | None = option(
        None, low=0, high=1e9, exclude="low", resume="fixed", students="own", derived={MILESTONE: None}
    )
    """The same in millions of parameters (70: 70 M)."""
    vocab: str | int = option(
        "all", limited_by="rules.py: all, corpus or a number", resume="fixed", students="shared", derived=SAME
    )
    """Pieces of the vocabulary: all of the teacher's; corpus: those that the text uses; a number: the most frequent
    ones. The others are taken out of the teacher and its tokenizer before step 0 (docs/vocabulary.md)."""
    init: Literal["teacher", "random"] = option("teacher", resume="fixed", students="own", derived=SAME)
    """Initial weights. teacher: a copy of the teacher, which is then pruned; random: random, at the target size."""
    num_hidden_layers: int | None = option(
        None,
        limited_by="layer_map.py: up to the teacher's",
        resume="fixed",
        students="own",
        derived=SAME,
    )
    """Layers M of the student, 1 .. N (None: the N layers of the teacher). Student layer m is compared with the teacher
    layer nearest to (m + 1) x N / M - 1, and starts as the teacher layer given by init_layers, which does the part of
    those that leave as well, unless pruning.compensation is none (docs/depth.md)."""
    init_layers: list[int] = option(
        [],
        limited_by="layer_map.py: layers of the teacher",
        resume="fixed",
        students="own",
        derived=SAME,
    )
    """Teacher layers that the layers of a shallower student start from, ascending, from 0; empty: those
    nearest to m x N / M (at half the depth every second one, from the first)."""
    layer_choice: Literal["uniform", "influence"] = option(
        "uniform", resume="fixed", students="own", derived={MEASUREMENT: "uniform"}
    )
    """Which layers a shallower copy keeps, where init_layers is empty. uniform: those nearest to m x N / M; influence:
    the first one, and those that change their input most (1 - cosine, ShortGPT) on pruning.calibration_batches batches.
    Each is then compared with the last teacher layer before the next one that stayed."""
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
    """Target number of neurons per feed-forward block (<= teacher's)."""
    num_attention_heads: int | None = option(
        None,
        limited_by="models/shapes.py: up to the teacher's",
        resume="fixed",
        students="own",
        derived={MILESTONE: COMPUTED},
    )
    """Target heads of a layer (<= teacher's). Head size becomes hidden_size / num_attention_heads (<= teacher's), but
    rotary heads keep theirs (or have head_dim)."""
    num_key_value_heads: int | None = option(
        None,
        limited_by="models/shapes.py: up to the teacher's",
        resume="fixed",
        students="own",
        derived={MILESTONE: None},
    )
    """Target key/value heads of a layer where query heads share them (None: as many as num_attention_heads allows)."""
    head_dim: int | None = option(
        None,
        limited_by="models/head_dim.py: even, up to the teacher's",
        resume="fixed",
        students="own",
        derived={MILESTONE: None},
    )
    """Target dims of a head where positions are rotary, of rope_type default, and query heads grouped (None: the
    teacher's). Pairs that stay are an arithmetic progression: the export is a stock model with another rope_theta."""
    dropout: float = option(0.0, low=0, high=1, exclude="high", resume="fixed", students="shared", derived=SAME)
    """Dropout probability during distillation, in [0, 1). The exported config keeps the teacher's values."""
    compile: bool = option(False, resume="fixed", students="own", derived=SAME)
    """Use torch.compile for the student's layers. They are recompiled after each resize event, so use few events."""

    def __post_init__(self) -> None:
        self.vocab = str(self.vocab)


@dataclass(kw_only=True)
class DataConfig:
    """data: text, and its preparation"""

    sources: list[str] | str = option(
        ["embedded"], limited_by="data/sources: what can be read", resume="content", students="shared", derived=SAME
    )
    """Files or folders (.txt, .jsonl, .parquet, Wikipedia dumps .xml; all but .parquet also .gz, .bz2, .xz, .zst), URLs
    of them (s3://, gs://, https://, ... through fsspec), hub data sets (wikipedia, bookcorpus, owner/name[:config]),
    or packaged text: embedded (all of it), embedded:wikipedia, embedded:bible, embedded:sotu, embedded:moby-dick."""
    text_documents: Literal["file", "paragraph"] = option("file", resume="fixed", students="shared", derived=SAME)
    """What counts as a document in .txt files: the whole file, or each block between blank lines."""
    text_column: str = option("text", limited_by="rules.py: not empty", resume="fixed", students="shared", derived=SAME)
    """Column that holds the text in .jsonl, .parquet and hub data sets; a list of words is joined by spaces."""
    seq_len: int = option(64, low=3, high=2**20, resume="fixed", students="shared", derived=SAME)
    """Tokens of a block, with [CLS] and [SEP] where the task has them (3 .. the teacher's max_position_embeddings).
    Unless it is set: as many as the teacher has positions for, at most 512, and 128 where a block holds one text."""
    short_steps: float = option(
        0.0, low=0, high=1, exclude="high", resume="fixed", students="shared", derived={CORRECTION: 0.0}
    )
    """Tasks mlm and none: share of the steps, in [0, 1), whose blocks are split into 2, 4 or 8 shorter ones, so that
    short texts are learned, too. Unless it is set: .5 where data.seq_len is left open, otherwise 0."""
    heldout_fraction: float = option(
        0.05, low=0, high=1, exclude="both", resume="fixed", students="shared", derived=SAME
    )
    """Fraction of documents kept for evaluation, in (0, 1). Split by document."""
    task: Literal["auto", "mlm", "causal", "none", "embedding", "scores", "token_scores"] = option(
        "auto", resume="free", students="shared", derived=SAME
    )
    """What is predicted: masked tokens (mlm), the next one (causal), or nothing (none): an encoder then learns hidden
    states, attention and embeddings alone, without a language-modelling head. embedding: the same, and the vectors of
    texts that sentence-transformers makes of its hidden states. scores: the logits of a sequence classifier or
    cross-encoder, on texts or pairs; token_scores: those of a token classifier, at every token of single texts, which
    scores becomes for such a teacher. auto: what the teacher does (scores where its config.json names a
    ...ForSequenceClassification, token_scores where it names a ...ForTokenClassification, embedding where it has a
    modules.json)."""
    texts: Literal["document", "passage", "sentence"] = option(
        "passage", resume="fixed", students="shared", derived=SAME
    )
    """Tasks embedding, scores and token_scores: what one text is, which gets a sequence of its own. document: its
    beginning, up to seq_len; passage: each document in pieces of nearly equal length, of at most seq_len; sentence:
    each sentence, by a simple rule (docs/embedders.md)."""
    pooling: Literal["auto", "mean", "cls", "last"] = option("auto", resume="fixed", students="shared", derived=SAME)
    """Task embedding: how hidden states become one vector: the mean over tokens, or the first (cls) or last token's.
    auto: as the teacher's modules.json says, and mean where it has none."""
    prompt: str = option(
        "auto",
        limited_by="data/prepare/texts.py: shorter than seq_len",
        resume="fixed",
        students="shared",
        derived=SAME,
    )
    """Tasks embedding, scores and token_scores: what is put before every text: the name of one of the teacher's
    prompts, or a text such as "query: ". auto: the teacher's default prompt, if it has one; none: nothing. Not for
    pairs."""
    pair_columns: list[str] = option(
        [], limited_by="rules.py: two columns", resume="fixed", students="shared", derived=SAME
    )
    """Task scores: the two columns of .jsonl, .parquet and hub data sets that make a pair, such as [query,passage] or
    [sentence1,sentence2]. Empty: single texts (data.texts)."""
    truncation: Literal["longest_first", "only_second"] = option(
        "longest_first", resume="fixed", students="shared", derived=SAME
    )
    """Pairs longer than seq_len lose tokens at the end of the longer text, or of the second one (only_second)."""
    label_column: str | None = option(
        None,
        limited_by="data/sources/sources.py: a column of .jsonl, .parquet and hub data sets",
        resume="fixed",
        students="shared",
        derived=SAME,
    )
    """Task scores: column of .jsonl, .parquet and hub data sets that holds ground-truth labels: names or numbers of the
    teacher's labels, scores, or lists of them; null or -100: the text has none. Of a token classifier: a list with a
    name or number for each word. Texts are then whole documents (data.texts). Unset: no labels."""
    check_label_order: bool = option(True, resume="free", students="shared", derived=SAME)
    """Refuse labels that fit the teacher clearly better in another order (docs/classifiers.md), before training."""
    mask_probability: float = option(
        0.15, low=0.0001, high=1, exclude="high", resume="fixed", students="shared", derived={CORRECTION: KEY}
    )
    """Task mlm: fraction of ordinary tokens to predict, in (0, 1); of these 80 % become [MASK], 10 % random, 10 % stay.
    """
    cache_dir: str = option(
        "~/.cache/homodistil", limited_by="values.py: a path", resume="free", students="shared", derived=SAME
    )
    """Folder for downloaded assets, tokenised corpora and corrected teachers."""
    workers: int = option(0, low=0, high=4096, resume="free", students="shared", derived=SAME)
    """Processes for tokenising, and data-loader workers per rank (0 = in the training process)."""
    shard_bytes: int = option(64_000_000, low=1, high=2**50, resume="free", students="shared", derived=SAME)
    """Bytes of text per unit of preparation, which is repeated after a kill. The blocks do not depend on it."""
    weights: list[float] = option([], low=0, high=1000, exclude="low", resume="fixed", students="shared", derived=SAME)
    """One per source: how often its training blocks occur per epoch (2: twice, 0.5: every second). Empty: once each."""
    boilerplate_filter: Literal["none", "gopher"] = option("none", resume="fixed", students="shared", derived=SAME)
    """gopher: leave out documents that fail Gopher's rules on quality and repetition, as implemented in datatrove."""
    near_duplicates: Literal["none", "minhash"] = option("none", resume="fixed", students="shared", derived=SAME)
    """minhash: keep only the first of nearly equal documents (Jaccard similarity of word 5-grams above about 0.8)."""

    def __post_init__(self) -> None:
        if isinstance(self.sources, str):
            self.sources = [self.sources]
