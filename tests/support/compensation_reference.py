"""Compensation written once more, the slow way: float64, one process, all rows of all batches at once.

A functional BERT over a dict of weights (names as in the model) and, on it, the formulas of the sequential refit. Ridge
problems are solved as ordinary least squares with extra rows, not by normal equations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from homodistil.data.batch import Batch

Weights = dict[str, Tensor]
HEAD = "cls.predictions"


def weights_of(model: torch.nn.Module) -> Weights:
    return {name: value.detach().double().clone() for name, value in model.named_parameters()}


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def standardised(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()


def norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    return standardised(x) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def embedding_sum(weights: Weights, batch: Batch) -> Tensor:
    tables = "bert.embeddings"
    positions = weights[f"{tables}.position_embeddings.weight"][: batch.input_ids.shape[1]]
    words = weights[f"{tables}.word_embeddings.weight"][batch.input_ids]
    return words + positions + weights[f"{tables}.token_type_embeddings.weight"][0]


def context(weights: Weights, i: int, x: Tensor, batch: Batch, num_heads: int, scale: float) -> Tensor:
    """Attention before its output projection, head after head."""
    name = f"bert.encoder.layer.{i}.attention.self"
    q, k, v = (
        linear(weights, f"{name}.{part}", x).unflatten(-1, (num_heads, -1)) for part in ("query", "key", "value")
    )
    scores = torch.einsum("bqnh,bknh->bnqk", q, k) * scale
    scores = scores.masked_fill(batch.attention_mask[:, None, None, :] == 0, -math.inf)
    return torch.einsum("bnqk,bknh->bqnh", scores.softmax(-1), v).flatten(-2)


def layer_places(weights: Weights, i: int, x: Tensor, batch: Batch, num_heads: int, scale: float) -> dict[str, Tensor]:
    """Every activation of a layer that a refit aims at, by a name of its own."""
    layer = f"bert.encoder.layer.{i}"
    found = {part: linear(weights, f"{layer}.attention.self.{part}", x) for part in ("query", "key", "value")}
    attended = context(weights, i, x, batch, num_heads, scale)
    found["attention_sum"] = linear(weights, f"{layer}.attention.output.dense", attended) + x
    found["attention"] = norm(weights, f"{layer}.attention.output.LayerNorm", found["attention_sum"])
    found["neurons"] = linear(weights, f"{layer}.intermediate.dense", found["attention"])
    found["ffn_sum"] = linear(weights, f"{layer}.output.dense", gelu(found["neurons"])) + found["attention"]
    found["output"] = norm(weights, f"{layer}.output.LayerNorm", found["ffn_sum"])
    return found


def head_rows(weights: Weights, hidden: Tensor) -> Tensor:
    """What enters the decoder."""
    dense = linear(weights, f"{HEAD}.transform.dense", hidden)
    return norm(weights, f"{HEAD}.transform.LayerNorm", gelu(dense))


def logits(weights: Weights, rows: Tensor) -> Tensor:
    return rows @ weights["bert.embeddings.word_embeddings.weight"].T + weights[f"{HEAD}.bias"]


def last_hidden(weights: Weights, batch: Batch, num_layers: int, num_heads: int, scale: float) -> Tensor:
    x = norm(weights, "bert.embeddings.LayerNorm", embedding_sum(weights, batch))
    for i in range(num_layers):
        x = layer_places(weights, i, x, batch, num_heads, scale)["output"]
    return x


class Reference:
    """The refit of `new` (weights of the cut network, changed in place) towards `old`.

    Args:
        change: (name of a parameter, activations that run along its dim 0) -> those of the new network.
        heads: of each layer, in the old and in the new network.
    """

    def __init__(self, old: Weights, new: Weights, batches: list[Batch], change, heads, scale: float, ridge: float):
        self.old, self.new, self.batches, self.change, self.ridge = old, new, batches, change, ridge
        self.heads, self.scale = heads, scale

    def rows(self, parts: list[Tensor]) -> Tensor:
        masks = [batch.attention_mask.bool() for batch in self.batches]
        return torch.cat([part[mask] for part, mask in zip(parts, masks, strict=True)])

    def masked(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([p.flatten(0, 1)[b.target_index] for p, b in zip(parts, self.batches, strict=True)])

    def fit_linear(self, name: str, x: Tensor, y: Tensor) -> None:
        start, (mean_x, mean_y) = self.new[f"{name}.weight"], (x.mean(0), y.mean(0))
        x, y = x - mean_x, y - mean_y
        penalty = math.sqrt(self.ridge * float(x.square().sum()) / x.shape[1])
        extended = torch.cat([x, penalty * torch.eye(x.shape[1], dtype=x.dtype)])
        residual = torch.cat([y - x @ start.T, x.new_zeros(x.shape[1], y.shape[1])])
        self.new[f"{name}.weight"] = start + torch.linalg.lstsq(extended, residual).solution.T
        self.new[f"{name}.bias"] = mean_y - self.new[f"{name}.weight"] @ mean_x

    def fit_norm(self, name: str, x: Tensor, y: Tensor) -> None:
        z = standardised(x)
        penalty = self.ridge * z.var(0, correction=0).mean()
        for j in range(z.shape[1]):
            a, b, start = z[:, j] - z[:, j].mean(), y[:, j] - y[:, j].mean(), self.new[f"{name}.weight"][j]
            gamma = start + (a @ (b - start * a)) / (a @ a + len(a) * penalty)
            self.new[f"{name}.weight"][j] = gamma
            self.new[f"{name}.bias"][j] = y[:, j].mean() - gamma * z[:, j].mean()

    def run(self) -> None:
        name = "bert.embeddings.LayerNorm"
        x_old = [norm(self.old, name, embedding_sum(self.old, batch)) for batch in self.batches]
        sums = [embedding_sum(self.new, batch) for batch in self.batches]
        self.fit_norm(name, self.rows(sums), self.change(f"{name}.bias", self.rows(x_old)))
        x_new = [norm(self.new, name, part) for part in sums]
        for i in range(len(self.heads)):
            x_old, x_new = self.layer(i, x_old, x_new)
        self.hidden_old, self.hidden_new = self.masked(x_old), self.masked(x_new)

    def layer(self, i: int, x_old: list[Tensor], x_new: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        layer, (old_heads, new_heads) = f"bert.encoder.layer.{i}", self.heads[i]
        places = [
            layer_places(self.old, i, x, b, old_heads, self.scale) for x, b in zip(x_old, self.batches, strict=True)
        ]
        old = {place: self.rows([found[place] for found in places]) for place in places[0]}
        for part in ("query", "key", "value"):
            name = f"{layer}.attention.self.{part}"
            self.fit_linear(name, self.rows(x_new), self.change(f"{name}.bias", old[part]))
        both = zip(x_new, self.batches, strict=True)
        contexts = [context(self.new, i, x, b, new_heads, self.scale) for x, b in both]
        x_new = self.block(f"{layer}.attention.output", contexts, x_new, old["attention_sum"], old["attention"])
        name = f"{layer}.intermediate.dense"
        self.fit_linear(name, self.rows(x_new), self.change(f"{name}.bias", old["neurons"]))
        active = [gelu(linear(self.new, name, x)) for x in x_new]
        x_new = self.block(f"{layer}.output", active, x_new, old["ffn_sum"], old["output"])
        return [found["output"] for found in places], x_new

    def block(self, name: str, inputs: list[Tensor], residual: list[Tensor], sums: Tensor, out: Tensor) -> list[Tensor]:
        bias = f"{name}.LayerNorm.bias"
        self.fit_linear(f"{name}.dense", self.rows(inputs), self.change(bias, sums) - self.rows(residual))
        found = [linear(self.new, f"{name}.dense", h) + x for h, x in zip(inputs, residual, strict=True)]
        self.fit_norm(f"{name}.LayerNorm", self.rows(found), self.change(bias, out))
        return [norm(self.new, f"{name}.LayerNorm", part) for part in found]

    def head(self) -> None:
        """As any other part."""
        dense, name = f"{HEAD}.transform.dense", f"{HEAD}.transform.LayerNorm"
        before, after = linear(self.old, dense, self.hidden_old), head_rows(self.old, self.hidden_old)
        self.fit_linear(dense, self.hidden_new, self.change(f"{dense}.bias", before))
        self.end_of_head(self.change(f"{name}.bias", after))

    def straight_head(self, predictions: Tensor) -> None:
        """In the activation's straight part, for the best logits that the new decoder can give."""
        dense, after = f"{HEAD}.transform.dense", head_rows(self.old, self.hidden_old)
        table = "bert.embeddings.word_embeddings.weight"
        weight = predictions.sqrt().unsqueeze(1)
        e_old, e_new = ((w - predictions @ w) * weight for w in (self.old[table], self.new[table]))
        # Least squares over the vocabulary: e_new t* = e_old t, row by row.
        best = torch.linalg.lstsq(e_new, e_old @ after.T).solution.T
        shape = (best - best.mean(0)) / best.std(0, correction=0)
        self.new[f"{dense}.weight"] = torch.zeros_like(self.new[f"{dense}.weight"])
        self.fit_linear(dense, self.hidden_new, standardised(shape) + 3)
        self.end_of_head(best)

    def end_of_head(self, wanted: Tensor) -> None:
        dense = linear(self.new, f"{HEAD}.transform.dense", self.hidden_new)
        self.fit_norm(f"{HEAD}.transform.LayerNorm", gelu(dense), wanted)
        difference = logits(self.old, head_rows(self.old, self.hidden_old))
        difference = difference - logits(self.new, head_rows(self.new, self.hidden_new))
        self.new[f"{HEAD}.bias"] = self.new[f"{HEAD}.bias"] + difference.mean(0)


def drawn_gradients(weights: Weights, batch: Batch, labels: Tensor, num_layers: int, num_heads: int, scale: float):
    """Gradients of the log-likelihood of `labels` at the output of every LayerNorm of the residual stream."""
    places = []

    def watch(x: Tensor) -> Tensor:
        places.append(x.requires_grad_() if not x.requires_grad else x)
        places[-1].retain_grad()
        return places[-1]

    x = watch(norm(weights, "bert.embeddings.LayerNorm", embedding_sum(weights, batch)))
    for i in range(num_layers):
        layer = f"bert.encoder.layer.{i}"
        summed = x + linear(weights, f"{layer}.attention.output.dense", context(weights, i, x, batch, num_heads, scale))
        x = watch(norm(weights, f"{layer}.attention.output.LayerNorm", summed))
        active = gelu(linear(weights, f"{layer}.intermediate.dense", x))
        x = watch(norm(weights, f"{layer}.output.LayerNorm", x + linear(weights, f"{layer}.output.dense", active)))
    rows = head_rows(weights, x.flatten(0, 1)[batch.target_index])
    functional.cross_entropy(logits(weights, rows), labels, reduction="sum").backward()
    return [place.grad[batch.attention_mask.bool()] for place in places]
