"""(a) Masks at full width, as DeepSpeed Compression and CoFi pruned: the student keeps the teacher's size, and what is
pruned is multiplied by 0.

As fast as we could make it: masks stand still (theirs are learned), one multiplication where one is enough, and
LayerNorm gathers the surviving dims, as CoFi's, but with a cheap backward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertForMaskedLM

from benchmarks.peers.stock_peer import StockPeer, load_model
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


class Peer(StockPeer):
    """Args: options: {"rows": "all"} computes logits on all positions, as those projects did; "masked" on the rows
    that the loss needs only, as nobody did."""

    def __init__(self, task: Task, files: Files, setting: str, options: dict) -> None:
        self.all_rows = options["rows"] == "all"
        student = load_model(files.teacher).train()
        mask_student(student, files.keep(), task.dtype)
        super().__init__(task, files, setting, student, task.hidden)

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher, teacher_logits = self.run(self.teacher, batch)
        student, logits = self.run(self.student, batch)
        maps = [self.heads_kept(output.attentions) for output in (student, teacher)]
        return self.compared(student, teacher, logits, teacher_logits, maps, batch)

    def run(self, model: nn.Module, batch: dict[str, Tensor]):
        """(output of the encoder, logits of the rows that the loss needs)."""
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        output = model.bert(**inputs, output_attentions=True, output_hidden_states=True)
        last, rows = output.last_hidden_state, self.rows(batch)
        return output, model.cls(last)[rows] if self.all_rows else model.cls(last[rows])


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
