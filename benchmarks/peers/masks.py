"""(a) Masks at full width, as DeepSpeed Compression and CoFi pruned: the student keeps the teacher's size, and what is
pruned is multiplied by 0.

As fast as we could make it: masks stand still (theirs are learned), one multiplication where one is enough, and
LayerNorm gathers the surviving dims, as CoFi's, but with a cheap backward.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertForMaskedLM, get_constant_schedule

from benchmarks.peers import objective
from benchmarks.peers.settings import computing_in, student_in, teacher_in
from benchmarks.peers.workload import Files, Task


class _Pick(torch.autograd.Function):
    """x[..., kept]; torch's own backward adds column by column."""

    @staticmethod
    def forward(ctx, x: Tensor, kept: Tensor) -> Tensor:
        ctx.kept, ctx.width = kept, x.shape[-1]
        return x.index_select(-1, kept)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        zeros = upstream.new_zeros(*upstream.shape[:-1], ctx.width)
        return zeros.index_copy_(-1, ctx.kept, upstream), None


class MaskedLayerNorm(nn.Module):
    """LayerNorm over the surviving dims of x (..., D), zeros elsewhere."""

    def __init__(self, norm: nn.LayerNorm, kept: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.register_buffer("kept", kept)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight[self.kept], self.bias[self.kept]
        normed = functional.layer_norm(_Pick.apply(x, self.kept), (len(self.kept),), weight, bias, self.eps)
        return normed.new_zeros(x.shape).index_copy(-1, self.kept, normed)


class Peer:
    """Args: options: {"rows": "all"} computes logits on all positions, as those projects did; "masked" on the rows
    that the loss needs only, as nobody did."""

    def __init__(self, task: Task, files: Files, setting: str, options: dict) -> None:
        self.task, self.setting, self.rows = task, setting, options["rows"]
        eager = {"attn_implementation": "eager"}
        self.teacher = teacher_in(setting, BertForMaskedLM.from_pretrained(files.teacher, **eager))
        self.student = BertForMaskedLM.from_pretrained(files.teacher, **eager).train()
        self.keep = files.keep()
        mask_student(self.student, self.keep, task.dtype)
        self.projections = objective.selections(task.layers + 1, self.keep["hidden"], task.hidden, task.hidden)
        student_in(setting, self.student, self.projections)
        self.optimizer = objective.adamw([self.student, self.projections])
        self.schedule = get_constant_schedule(self.optimizer)
        self.batches = itertools.cycle(files.batches())

    def step(self) -> None:
        batch = next(self.batches)
        with computing_in(self.setting):
            self.terms = self.losses(batch)
            total = torch.stack(list(self.terms.values())).sum()
        objective.update(total, self.optimizer, self.schedule)

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        mask, labels = batch["attention_mask"], batch["labels"]
        rows = mask.bool() if self.task.kl_positions == "all" else labels != -100
        with torch.no_grad():
            teacher, teacher_logits = self.run(self.teacher, batch, rows)
        student, logits = self.run(self.student, batch, rows)
        mlm, kl = objective.vocabulary_terms(logits, teacher_logits, labels[rows])
        own, theirs, projections = student.hidden_states, teacher.hidden_states, self.projections
        return {
            "mlm": mlm,
            "kl": kl,
            "hidden": objective.hidden_term(own[1:], theirs[1:], projections[1:], mask),
            "embedding": objective.hidden_term(own[:1], theirs[:1], projections[:1], mask),
            "attention": objective.attention_term(*map(self.surviving, (student, teacher)), mask),
        }

    def run(self, model: nn.Module, batch: dict[str, Tensor], rows: Tensor):
        """(output of the encoder, logits of `rows`)."""
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        output = model.bert(**inputs, output_attentions=True, output_hidden_states=True)
        last = output.last_hidden_state
        return output, model.cls(last[rows]) if self.rows == "masked" else model.cls(last)[rows]

    def surviving(self, output) -> list[Tensor]:
        """Attention of the heads that are not pruned."""
        return [layer[:, self.keep[f"layer.{i}.heads"]] for i, layer in enumerate(output.attentions)]


def mask_student(model: BertForMaskedLM, keep: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Hooks and norms that make the full-size model compute what the cut one would."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, MaskedLayerNorm(child, keep["hidden"]))
    for i, layer in enumerate(model.bert.encoder.layer):
        heads, attention = keep[f"layer.{i}.heads"], layer.attention.self
        shape = attention.num_attention_heads, attention.attention_head_size
        # Of query and key one is enough: a product with 0 is 0, forward and backward.
        _multiply(attention.query, _head_mask(keep[f"layer.{i}.qk_dim"], heads, shape).to(dtype))
        _multiply(attention.value, _head_mask(keep[f"layer.{i}.vo_dim"], heads, shape).to(dtype))
        ffn = torch.zeros(layer.intermediate.dense.out_features, dtype=dtype)
        ffn[keep[f"layer.{i}.ffn"]] = 1
        _multiply(layer.intermediate, ffn)


def _head_mask(dims: Tensor, heads: Tensor, shape: tuple[int, int]) -> Tensor:
    """(N * H,): 1 at the surviving dims of surviving heads. dims: (N, H_kept)."""
    mask = torch.zeros(shape)
    mask[heads] = mask[heads].scatter(1, dims[heads], 1.0)
    return mask.flatten()


def _multiply(module: nn.Module, mask: Tensor) -> None:
    module.register_forward_hook(lambda _module, _inputs, output: output * mask)
