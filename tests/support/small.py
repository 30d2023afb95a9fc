"""Small real models and batches that several tests share."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForMaskedLM

from homodistil.config.schema import LossConfig, RunConfig
from homodistil.data.batch import Batch, LossCounts
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.models.activations import ATTENTION
from homodistil.models.axes import AxisTable, outer_axes

VOCABULARY = 101


def small_model(seed: int = 0, **changes) -> BertForMaskedLM:
    """Three layers, 4 heads of 6, hidden 24, ffn 40; fp32, no dropout, tapped attention."""
    torch.manual_seed(seed)
    values = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 16,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,  # large enough that a wrong slice shows
        "attn_implementation": ATTENTION,
    }
    model = BertForMaskedLM(BertConfig(**(values | changes)))
    with torch.no_grad():  # fresh biases are zeros, which would hide a bias that is sliced wrongly
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def small_batch(seed: int = 0, lengths: tuple[int, ...] = (7, 11, 4)) -> Batch:
    """A padded batch with some masked positions; counts are its own, as tensors (what a feed makes of them)."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = max(lengths)
    attention_mask = (torch.arange(num_tokens) < torch.tensor(lengths)[:, None]).long()
    input_ids = torch.randint(5, VOCABULARY, attention_mask.shape, generator=generator) * attention_mask
    chosen = (torch.rand(attention_mask.shape, generator=generator) < 0.4) & attention_mask.bool()
    target_index = chosen.flatten().nonzero().squeeze(1)
    labels = torch.randint(5, VOCABULARY, (len(target_index),), generator=generator)
    token_index = attention_mask.flatten().nonzero().squeeze(1)
    counts = LossCounts(*torch.tensor([len(target_index), sum(lengths), sum(n * n for n in lengths)]).float().unbind())
    return Batch(input_ids, attention_mask, target_index, labels, token_index, counts)


def small_pair(**loss) -> tuple[Student, Teacher]:
    """A student that is still an exact copy of its teacher."""
    config = LossConfig(**({"kl": 1.0} | loss))
    return Student(small_model(), config), Teacher(small_model())


def plain_run() -> RunConfig:
    """A run by plain selection, slowly, all losses with weight 1: what tests of the machinery begin with, whatever the
    defaults are."""
    config = RunConfig()
    config.pruning.compensation, config.pruning.end_fraction, config.loss.kl = "none", 0.3, 1.0
    config.pruning.interval_steps, config.pruning.max_event_fraction = 10, 0.25
    return config


def plain_widths(hidden: int, ffn: int, heads: int) -> dict[str, int]:
    """Widths of one layer whose heads have keys and values of their own."""
    of_layer = {"ffn": ffn, "heads": heads, "qk_dim": hidden // heads, "vo_dim": hidden // heads}
    return {"hidden": hidden} | {f"layer.0.{kind}": width for kind, width in of_layer.items()}


def grouped_widths(hidden: int, ffn: int, groups: int, in_group: int, head_dim: int) -> dict[str, int]:
    """Widths of one layer with groups of query heads."""
    of_layer = {"ffn": ffn, "kv_heads": groups, "heads_in_group": in_group, "qk_dim": head_dim, "vo_dim": head_dim}
    return {"hidden": hidden} | {f"layer.0.{kind}": width for kind, width in of_layer.items()}


def random_keep(table: AxisTable, widths: dict[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random survivors for the given new widths; each head gets its own dims."""
    generator = torch.Generator().manual_seed(seed)
    outer = outer_axes(table.widths)
    keep = {}
    for axis, width in widths.items():
        rows = table.widths[outer[axis]] if axis in outer else 1
        chosen = [torch.randperm(table.widths[axis], generator=generator)[:width].sort().values for _ in range(rows)]
        keep[axis] = torch.stack(chosen) if axis in outer else chosen[0]
    return keep
