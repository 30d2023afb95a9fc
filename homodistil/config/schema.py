"""The typed config of a run: one YAML file plus dotted overrides. Field docstrings are the `--help` text.

DeepSpeed's JSON holds engine matters only (ZeRO stage, precision, buckets); everything a model depends on is here.
The defaults of methods are the best that we have measured (docs/results.md); the paper's form is a recipe.
Parsing lives in `command_line.py`; the rules that cross fields are in `rules.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from homodistil.config.rules import check_rules


@dataclass(kw_only=True)
class TeacherConfig:
    """teacher: the big model, and its correction on the corpus"""

    name: str = "embedded:bert-tiny"
    """Folder, hub name (bert-base-uncased) or packaged model: embedded:bert-tiny, embedded:minilm-l6."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Inference precision. auto: float16 on GPU; on CPU the student's precision. float16 needs a GPU."""
    correction_steps: int = 0
    """Optimizer steps of plain MLM on the corpus before distilling (0 = none). The result is cached by content."""
    correction_lr: float = 1e-3
    """Peak learning rate of the correction (> 0)."""
    correction_seed: int = 0
    """Data order and masking of the correction (>= 0). train.seed has no part in it: all seeds share a teacher."""
    allow_pickle: bool = False
    """Accept a teacher that has no .safetensors, only pickled weights; they are still read with weights_only."""
    runtime: Literal["torch", "compile", "deepspeed"] = "torch"
    """How the frozen teacher runs: as it is, under torch.compile, or under deepspeed.init_inference."""
    lock_step: bool = True
    """With runtime=torch: each teacher layer runs just before the student's, and is freed once compared: less memory,
    the same numbers. false: the whole teacher first."""
    own_stream: bool = False
    """GPU: run the teacher on a CUDA stream of its own, beside the student's forward (leaves lock-step)."""
    shard: bool = False
    """Share the teacher's layers out over the ranks, for one that does not fit a GPU: each layer is gathered to run."""

    @property
    def in_lock_step(self) -> bool:
        return self.lock_step and self.runtime == "torch" and not self.own_stream


@dataclass(kw_only=True)
class StudentConfig:
    """student: the size to reach"""

    preset: Literal[
        "custom", "teacher", "quickstart", "homobert-base", "homobert-small", "homobert-xsmall", "homobert-tiny"
    ] = "custom"
    """Target size by name; custom: hidden_size, intermediate_size and num_attention_heads, all set; teacher: the
    teacher's own widths. A field that is set wins over the preset."""
    init: Literal["teacher", "random"] = "teacher"
    """What the student starts from: teacher = its copy, then pruned; random = fresh weights at the target size."""
    num_hidden_layers: int | None = None
    """Layers of the student (None: as many as the teacher). Student layer m is compared with teacher layer
    (m + 1) x N / M - 1, and starts as a copy of the teacher layer that init_layers says."""
    init_layers: list[int] = field(default_factory=list)
    """Teacher layers that a shallower student starts from, ascending, counted from 0; empty: every (N / M)-th."""
    hidden_size: int | None = None
    """Target width of the residual stream (<= teacher's, divisible by num_attention_heads)."""
    intermediate_size: int | None = None
    """Target neurons of each feed-forward block (<= teacher's)."""
    num_attention_heads: int | None = None
    """Target heads a layer (<= teacher's). Head size becomes hidden_size / num_attention_heads (<= teacher's)."""
    dropout: float = 0.0
    """Dropout probability while distilling, in [0, 1). The exported config keeps the teacher's values."""
    compile: bool = False
    """torch.compile the student's layers: compiled anew after each resize event, so for long runs with few events."""


@dataclass(kw_only=True)
class DataConfig:
    """data: text, and how it becomes batches"""

    sources: list[str] | str = field(default_factory=lambda: ["embedded"])
    """Files or folders (.txt, .jsonl, .parquet, Wikipedia dumps .xml; all but .parquet also .gz, .bz2, .xz, .zst), URLs
    of them (s3://, gs://, https://, ... through fsspec), hub data sets (wikipedia, bookcorpus, owner/name[:config]),
    or packaged text: embedded (all of it), embedded:wikipedia, embedded:bible, embedded:sotu, embedded:moby-dick."""
    text_documents: Literal["file", "paragraph"] = "file"
    """What one document is in .txt files: the whole file, or each block between blank lines."""
    text_column: str = "text"
    """Column that holds the text in .jsonl, .parquet and hub data sets."""
    seq_len: int = 64
    """Tokens of a block, [CLS] and [SEP] included (3 .. the teacher's max_position_embeddings)."""
    heldout_fraction: float = 0.05
    """Fraction of documents kept for evaluation, in (0, 1). Split by document."""
    mask_probability: float = 0.15
    """Fraction of ordinary tokens to predict, in (0, 1); of these 80 % become [MASK], 10 % random, 10 % stay."""
    cache_dir: str = "~/.cache/homodistil"
    """Where fetched assets, tokenised corpora and corrected teachers are kept."""
    workers: int = 0
    """Processes for tokenising, and data-loader workers a rank (0 = in the training process)."""
    shard_bytes: int = 64_000_000
    """Text (bytes) that is prepared, and after a kill done again, at once. The blocks do not depend on it."""
    weights: list[float] = field(default_factory=list)
    """One a source: how often its training blocks come in an epoch (2: twice, 0.5: every second). Empty: once each."""
    boilerplate_filter: Literal["none", "gopher"] = "none"
    """Leave out documents that fail Gopher's rules on quality and repetition, as datatrove has them."""
    near_duplicates: Literal["none", "minhash"] = "none"
    """minhash: of documents that are nearly the same (Jaccard of word 5-grams about 0.8) only the first stays."""

    def __post_init__(self) -> None:
        if isinstance(self.sources, str):
            self.sources = [self.sources]


@dataclass(kw_only=True)
class TrainConfig:
    """train: steps, batches, learning rate, what happens in between"""

    steps: int = 600
    """Optimizer steps (>= 1)."""
    global_batch_size: int = 32
    """Sequences an optimizer step over all ranks; a multiple of micro_batch_size x ranks."""
    micro_batch_size: int = 16
    """Sequences a rank processes at once; the rest of the global batch is gradient accumulation."""
    lr: float = 3e-3
    """Peak learning rate (> 0), linear warm-up then linear decay to 0."""
    lr_steps: int = 0
    """Steps over which the learning rate warms up and falls to 0 (0 = steps; not fewer than steps)."""
    cool_from: list[int] = field(default_factory=list)
    """Steps after each of which the learning rate falls linearly to 0 within cool_steps; then it is as without."""
    cool_steps: int = 0
    """Length of each fall that cool_from names (>= 0)."""
    rewarm_steps: int = 0
    """After each resize event the learning rate climbs back linearly over so many steps (0 = it does not fall)."""
    warmup_fraction: float = 0.1
    """Fraction of steps spent warming up, in [0, 1]."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices (>= 0); vectors and distillation projections have none."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm (0 = no clipping)."""
    seed: int = 0
    """Data order, masking and initialisation (>= 0)."""
    save_every_steps: int = 0
    """Steps between checkpoints (0 = only at the end)."""
    eval_every_steps: int = 0
    """Steps between held-out evaluations (0 = only at the end)."""
    eval_batch_size: int = 64
    """Sequences a rank evaluates at once."""
    log_every_steps: int = 10
    """Steps between lines of metrics.jsonl and TensorBoard (>= 1). Losses are looked at, and checked, only then."""


@dataclass(kw_only=True)
class PruningConfig:
    """pruning: when and which neurons go"""

    schedule: Literal["cubic", "linear", "one_shot", "gap", "none"] = "cubic"
    """How widths fall: cubic (the paper), linear, one_shot (all at step 0), gap (as fast as gap_bound allows), none
    (width stays what it is)."""
    start_fraction: float = 0.0
    """t_i as a fraction of train.steps, in [0, 1]."""
    end_fraction: float = 0.1
    """t_f as a fraction of train.steps, in [0, 1], >= start_fraction (paper: 0.5, 0.7 or 0.9)."""
    interval_steps: int = 5
    """Steps between resize events (>= 1)."""
    width_multiple: int = 1
    """Widths of the residual stream on the way are multiples of this (>= 1; 64 suits tensor cores)."""
    ffn_multiple: int = 8
    """The same for feed-forward widths."""
    head_dim_multiple: int = 1
    """The same for the dims of a head."""
    max_event_fraction: float = 0.5
    """Largest share of an axis one event may remove, in (0, 1]. one_shot ignores it."""
    gap_bound: float = 0.1
    """schedule=gap: largest rise of the KL to the teacher (nats, on the probe) that one event may cause (> 0)."""
    gap_recovery: float = 0.5
    """schedule=gap: share of the last event's rise that must be won back before the next event, in [0, 1]; not waited
    for once pruning is behind a straight line to the target."""
    importance: Literal["sensitivity", "magnitude", "random", "platon", "teacher_kl"] = "sensitivity"
    """Score of an entry: |theta * gradient| (the paper), |theta|, random, sensitivity x uncertainty (PLATON), or
    |theta * gradient| of the cross-entropy to labels sampled from the teacher instead of the whole loss."""
    ema_beta: float = 0.85
    """Smoothing of the scores over steps, in [0, 1)."""
    uncertainty_beta: float = 0.95
    """Smoothing of PLATON's uncertainty, in [0, 1)."""
    calibration_batches: int = 10
    """Global batches over which one_shot measures importance before step 0 (>= 1)."""
    protect_outliers: float = 0.1
    """Residual dims with more than this share of the variance at any LayerNorm stay (0 = protect none)."""
    compensation: Literal["none", "refit", "full"] = "full"
    """What a cut does about what it takes away: none (the paper), refit (least squares of what remains), full (rotated
    heads and a projected residual stream, then refit). Without effect where nothing is cut."""
    compensation_sequences: int = 128
    """Training sequences over all ranks that an event's statistics are taken on (>= 1)."""
    compensation_ridge: float = 1e-2
    """Ridge of the refit, as a share of the mean variance of its inputs (> 0)."""
    compensation_limit: float = 0.25
    """full: largest rise of the held-out loss (nats) by a mere rotation at full width, found at start; above it the
    residual dims that protect_outliers names are kept as they are and only the others are rotated, and where that costs
    too much as well, nothing is: events are then compensated as with refit, and the run says so."""
    one_shot_stages: int = 1
    """one_shot with compensation: cut in so many stages of equal ratio (>= 1)."""
    carry_moments: bool = True
    """Keep Adam's moments of what survives an event; false: they start from 0 (for comparisons)."""


@dataclass(kw_only=True)
class LossConfig:
    """loss: weights and forms of the terms"""

    mlm: float = 1.0
    """Weight of masked language modelling (>= 0)."""
    kl: float = 4.0
    """alpha1: weight of KL(teacher || student) of the MLM head's output (>= 0; paper: 1)."""
    hidden: float = 1.0
    """alpha2: weight of the hidden-state MSE, summed over layers (>= 0)."""
    attention: float = 1.0
    """alpha3: weight of the attention MSE, summed over layers (>= 0)."""
    embedding: float = 1.0
    """alpha4: weight of the embedding MSE (>= 0)."""
    cosine: float = 0.0
    """Weight of 1 - cosine of the last hidden states (DistilBERT), mean over tokens (>= 0)."""
    relations: float = 0.0
    """Weight of the self-attention relations Q-Q, K-K and V-V (MiniLMv2), KL(teacher || student) of each (>= 0)."""
    relation_heads: int = 0
    """Relation heads that the dims of all heads are regrouped into (0: the teacher's number of heads)."""
    relation_layer: int = -1
    """Teacher layer whose relations the student's last layer learns; negative counts from the last."""
    kl_temperature: float = 1.0
    """Temperature of the KL term (> 0); the term carries its square."""
    kl_positions: Literal["masked", "all"] = "masked"
    """Rows on which the KL is taken."""
    attention_target: Literal["scores", "probabilities", "probabilities_kl"] = "scores"
    """What the attention term compares: q.k/sqrt(d) before the softmax (MSE; TinyBERT's code), or after it (MSE, or
    KL(teacher || student) a query)."""
    projection: Literal["student", "teacher"] = "student"
    """Side of W in the hidden and embedding terms: MSE(H_s W, H_t) or the paper's slide MSE(H_s, H_t W)."""
    projection_learned: bool = True
    """Train W, or keep it the selection of the surviving dims."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """What computes the terms: auto = Triton on a GPU where it is installed, torch elsewhere."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """optimizer: AdamW"""

    implementation: Literal["torch_fused", "deepspeed_fused", "apex_fused"] = "torch_fused"
    """AdamW from torch (fused), DeepSpeed's ops (built on first use) or NVIDIA apex (recognised by its files)."""
    beta1: float = 0.9
    """Adam's beta1, in [0, 1)."""
    beta2: float = 0.999
    """Adam's beta2, in [0, 1)."""
    eps: float = 1e-6
    """Adam's epsilon (> 0)."""


@dataclass(kw_only=True)
class RunFolderConfig:
    """run: the run folder"""

    dir: str | None = None
    """Run folder. Unset: runs/<run.name>."""
    name: str = "quickstart"
    """Name of the run, used for the folder and in reports."""
    resume: Literal["never", "auto", "must"] = "never"
    """never: the folder must be new; auto: go on from the last checkpoint if there is one; must: insist on one."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept (>= 1)."""
    async_checkpoints: bool = False
    """Write checkpoints while training goes on; costs memory for one copy of the state on every rank's host."""
    grow_micro_batch: bool = False
    """Let the micro-batch grow into the memory that resizing frees: same global batch, fewer accumulation steps."""
    rank_timeout_s: float = 1800.0
    """Seconds (> 0) without progress after which a rank is called stuck and the job ends; dead ones are seen sooner."""
    rank_logs: bool = False
    """Also keep what each rank says in logs/rank-NNNNN.txt of the run folder."""
    export_milestones: list[float] = field(default_factory=list)
    """Fractions of the teacher's hidden size, in (0, 1): the widths pass the nearest stock shape of each exactly, and a
    stock checkpoint with its scores is written there (family.json)."""
    settle_steps: int = 0
    """Optimizer steps (>= 0) for which a milestone's widths are held before it is exported; pruning still ends at
    pruning.end_fraction. One that has the final widths is exported at the end of training."""
    settle_cooldown: bool = True
    """Let the learning rate fall linearly to 0 while a milestone settles, as it does at the end of a run: what is
    exported is then better. Afterwards it is as without (train.rewarm_steps softens the return)."""
    compare: list[Literal["one_shot", "plain_one_shot"]] = field(default_factory=list)
    """Controls trained afterwards with the same data, losses and steps, for the result table: cut before step 0, with
    the run's own compensation (one_shot) or without any (plain_one_shot). Each milestone gets its own, twice: with a
    learning rate that falls to 0 within the milestone's steps, and with the run's own rates."""


@dataclass(kw_only=True)
class RunConfig:
    """Everything a run depends on except the engine's JSON."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunFolderConfig = field(default_factory=RunFolderConfig)

    @property
    def run_dir(self) -> str:
        return self.run.dir or f"runs/{self.run.name}"

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def check(self) -> None:
        """Rules on values and between fields that need no model, data or ranks. Raises `UserError`."""
        check_rules(self)
