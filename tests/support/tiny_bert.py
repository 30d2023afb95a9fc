"""A tiny real BERT, its data, and a hand-written account of which entries of which parameters leave at an event.

Written without homodistil on purpose: the distributed tests hold the product against it. Widths are odd (9 dims a head,
55 and 41 neurons, ...) so that no partition boundary falls on the edge of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

NUM_LAYERS, NUM_HEADS, VOCABULARY, TOKENS = 2, 4, 97, 12
FROZEN = "bert.embeddings.position_embeddings.weight"


def make_model(dtype: torch.dtype = torch.float32, num_layers: int = NUM_LAYERS) -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=36,
        num_hidden_layers=num_layers,
        num_attention_heads=NUM_HEADS,
        intermediate_size=55,
        vocab_size=VOCABULARY,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config).to(dtype)
    model.get_parameter(FROZEN).requires_grad_(False)  # stands for frozen projections: in no optimizer group
    return model


def make_batch(index: int, num_rows: int) -> dict[str, Tensor]:
    """Every row has the same number of labels, so the mean over ranks of means is the global mean."""
    generator = torch.Generator().manual_seed(1000 + index)
    labels = torch.randint(5, VOCABULARY, (num_rows, TOKENS), generator=generator)
    labels[:, 1::2] = (labels[:, 0::2] * 7 + 3) % (VOCABULARY - 5) + 5  # something to learn
    input_ids = labels.clone()
    input_ids[:, 1::4] = 4
    labels[:, [t for t in range(TOKENS) if t % 4 != 1]] = -100
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def param_groups(model: nn.Module) -> list[dict]:
    """Matrices with weight decay, vectors without, and one small vector alone.

    After the last event the small group has 5 elements: on 4 ranks one rank holds nothing but padding of it.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    small = model.get_parameter("bert.embeddings.LayerNorm.bias")
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trainable if p.ndim == 1 and p is not small], "weight_decay": 0.0},
        {"params": [small], "weight_decay": 0.0},
    ]


def lr_factor(step: int) -> float:
    return min(1.0, (step + 1) / 3) * (1 - step / 100)


def pick(size: int, count: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def pick_per_head(num_heads: int, size: int, count: int, seed: int) -> Tensor:
    return torch.stack([pick(size, count, seed * 100 + head) for head in range(num_heads)])


def events() -> dict[int, dict[str, Tensor]]:
    """Step -> what stays at its beginning. Every kind of axis, alone and together, down to a single neuron."""
    return {
        2: {"layer.0.ffn": pick(55, 41, 1)},
        4: {"hidden": pick(36, 29, 2)},
        5: {
            "layer.0.heads": pick(4, 3, 3),
            "layer.0.qk_dim": pick_per_head(4, 9, 7, 4),
            "layer.0.vo_dim": pick_per_head(4, 9, 7, 5),
            "layer.1.qk_dim": pick_per_head(4, 9, 8, 6),
            "layer.1.vo_dim": pick_per_head(4, 9, 8, 7),
        },
        7: {
            "hidden": pick(29, 23, 8),
            "layer.0.ffn": pick(41, 30, 9),
            "layer.1.ffn": pick(55, 31, 10),
            "layer.0.qk_dim": pick_per_head(3, 7, 5, 11),
            "layer.0.vo_dim": pick_per_head(3, 7, 5, 12),
            "layer.1.heads": pick(4, 3, 13),
        },
        9: {"layer.1.ffn": pick(31, 30, 14)},
        10: {"hidden": pick(23, 5, 15)},
    }


def depth_events() -> dict[int, dict[str, Tensor | list[int]]]:
    """The same for a model of `num_layers` layers, some of which leave as a whole, the last one among them."""
    return {
        2: {"layers": [0, 1, 3]},
        4: {"layer.2.ffn": pick(55, 41, 1), "hidden": pick(36, 29, 2)},
        6: {"layers": [0, 1]},
        9: {"layer.1.ffn": pick(55, 31, 10)},
    }


def num_layers(events: dict[int, dict]) -> int:
    """Layers that a model for these events has at first."""
    return 4 if any("layers" in keep for keep in events.values()) else NUM_LAYERS


def slices(model: BertForMaskedLM, keep: dict[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    """Parameter name -> dimension -> rows that stay, spelt out for BERT."""
    cuts: dict[str, dict[int, Tensor]] = {}
    if "hidden" in keep:
        cut_hidden(cuts, keep["hidden"], len(model.bert.encoder.layer))
    for i in range(len(model.bert.encoder.layer)):
        layer, ffn = f"bert.encoder.layer.{i}", keep.get(f"layer.{i}.ffn")
        if ffn is not None:
            cuts.setdefault(f"{layer}.intermediate.dense.weight", {})[0] = ffn
            cuts.setdefault(f"{layer}.intermediate.dense.bias", {})[0] = ffn
            cuts.setdefault(f"{layer}.output.dense.weight", {})[1] = ffn
        attention = model.bert.encoder.layer[i].attention.self
        query_rows = _head_rows(attention, keep.get(f"layer.{i}.heads"), keep.get(f"layer.{i}.qk_dim"))
        value_rows = _head_rows(attention, keep.get(f"layer.{i}.heads"), keep.get(f"layer.{i}.vo_dim"))
        for part, rows in (("query", query_rows), ("key", query_rows), ("value", value_rows)):
            cuts.setdefault(f"{layer}.attention.self.{part}.weight", {})[0] = rows
            cuts.setdefault(f"{layer}.attention.self.{part}.bias", {})[0] = rows
        cuts.setdefault(f"{layer}.attention.output.dense.weight", {})[1] = value_rows
    return cuts


def cut_hidden(cuts: dict[str, dict[int, Tensor]], hidden: Tensor, num_layers: int = NUM_LAYERS) -> None:
    columns = [f"bert.embeddings.{t}_embeddings.weight" for t in ("word", "position", "token_type")]
    columns += ["cls.predictions.transform.dense.weight"]
    vectors = ["bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias"]
    vectors += ["cls.predictions.transform.dense.bias"]
    vectors += ["cls.predictions.transform.LayerNorm.weight", "cls.predictions.transform.LayerNorm.bias"]
    rows = ["cls.predictions.transform.dense.weight"]
    for i in range(num_layers):
        layer = f"bert.encoder.layer.{i}"
        columns += [f"{layer}.attention.self.{part}.weight" for part in ("query", "key", "value")]
        columns += [f"{layer}.intermediate.dense.weight"]
        for block in (f"{layer}.attention.output", f"{layer}.output"):
            rows += [f"{block}.dense.weight"]
            vectors += [f"{block}.dense.bias", f"{block}.LayerNorm.weight", f"{block}.LayerNorm.bias"]
    for name in columns:
        cuts.setdefault(name, {})[1] = hidden
    for name in rows + vectors:
        cuts.setdefault(name, {})[0] = hidden


def _head_rows(attention: nn.Module, heads: Tensor | None, dims: Tensor | None) -> Tensor:
    size = attention.attention_head_size
    kept_heads = range(attention.num_attention_heads) if heads is None else heads.tolist()
    return torch.tensor([h * size + d for h in kept_heads for d in (range(size) if dims is None else dims[h].tolist())])


def take(tensor: Tensor, cuts: dict[int, Tensor]) -> Tensor:
    for dim, rows in cuts.items():
        tensor = tensor[rows] if dim == 0 else tensor[:, rows]
    return tensor.clone()


def drop_layers(model: BertForMaskedLM, kept: list[int]) -> None:
    """Layers leave; those that stay are renumbered."""
    for i in reversed(range(len(model.bert.encoder.layer))):
        if i not in kept:
            del model.bert.encoder.layer[i]
    model.config.num_hidden_layers = len(kept)


def renamed(name: str, kept: list[int]) -> str | None:
    """What a parameter is called once only the layers `kept` are left; None: it has left."""
    prefix, inside, rest = name.partition("encoder.layer.")
    if not inside:
        return name
    layer, _, rest = rest.partition(".")
    return f"{prefix}{inside}{kept.index(int(layer))}.{rest}" if int(layer) in kept else None


def refresh(model: BertForMaskedLM, keep: dict[str, Tensor]) -> None:
    """Sizes that Hugging Face's modules remember and compute with, once parameters have been cut."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(module.weight.shape)
    for i, layer in enumerate(model.bert.encoder.layer):
        attention = layer.attention.self
        attention.num_attention_heads = len(keep.get(f"layer.{i}.heads", range(attention.num_attention_heads)))
        attention.attention_head_size = attention.query.weight.shape[0] // attention.num_attention_heads
