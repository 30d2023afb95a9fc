"""A sentence embedder of more layers than the packaged one: each of its layers several times, trained to its vectors.

No embedder of twelve layers comes with a package. What is made here has as many, and vectors close to those of the one
it is made of; every table of it has to say that its layers were trained for minutes.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from homodistil.config.schema import RunConfig
from homodistil.data.cache import build_once
from homodistil.errors import UserError
from homodistil.models import family_of
from homodistil.models.sentence_head import SentenceHead
from homodistil.training.inputs import RunInputs, prepare_inputs, teacher_copy
from homodistil.training.teacher_checks import found_teacher

STEPS = 600
BATCH = 64
RATE = 3e-4
WARMUP_STEPS = 50
COSINE = 10.0
"""Weight of the cosine distance of the vectors, as in the product's loss; the squared distance of the states has 1."""
_LOG_EVERY = 50


class Encoded(NamedTuple):
    """B texts of T tokens as one of the two models has them; D its hidden size."""

    vectors: Tensor
    """(B, D), of unit length."""
    states: tuple[Tensor, ...]
    """Behind the embeddings and each layer, (B, T, D)."""


def deeper_embedder(config: RunConfig, num_layers: int, work: Path, steps: int = STEPS) -> str:
    """`teacher.name` of an embedder of `num_layers` layers with nearly the vectors of the config's teacher.

    Args:
        config: of a run whose teacher is an encoder of sentence vectors, and whose texts it is trained on.
        work: where the folder is made, once.
        steps: of its training, each of BATCH texts.

    Raises:
        UserError: no such teacher, or `num_layers` is not a multiple of its layers.
    """
    depth = AutoConfig.from_pretrained(found_teacher(config)).num_hidden_layers
    if num_layers % depth:
        raise UserError(f"--layers: found {num_layers}, allowed: a multiple of the {depth} of {config.teacher.name}")
    if num_layers == depth:
        return config.teacher.name
    name = config.teacher.name.strip("/").replace(":", "-").replace("/", "-")
    target = work / "deeper" / f"{name}-{num_layers}-layers-{steps}-steps"
    return str(build_once(target, lambda folder: _make(config, num_layers // depth, steps, folder)))


def _make(config: RunConfig, times: int, steps: int, folder: Path) -> None:
    run_inputs = prepare_inputs(copy.deepcopy(config), torch.device("cpu"))
    original = teacher_copy(run_inputs, torch.float32).eval()  # no dropout in either
    deeper = repeat_layers(original, times)
    _train(original, deeper, times, run_inputs, steps)
    family_of(deeper.config.model_type).backbone(deeper).save_pretrained(folder)
    run_inputs.tokenizer.save_pretrained(folder)


def repeat_layers(model: nn.Module, times: int) -> nn.Module:
    """A copy of an encoder in which each layer stands `times` times in a row. Its layers must be of one kind."""
    deeper = copy.deepcopy(model)
    layers = family_of(model.config.model_type).layers(deeper)
    repeated = [copy.deepcopy(layer) for layer in layers for _ in range(times)]
    layers.extend(repeated[len(layers) :])
    for index, layer in enumerate(repeated):
        layers[index] = layer
    deeper.config.num_hidden_layers = len(layers)
    return deeper


def _train(original: nn.Module, deeper: nn.Module, times: int, run_inputs: RunInputs, steps: int) -> None:
    head, padding = run_inputs.sentence_head(), run_inputs.tokenizer.pad_token_id
    draws = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(deeper.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1.0) * (1 - step / steps)
    )
    for step in range(steps):
        ids = torch.from_numpy(run_inputs.corpus.train[draws.integers(len(run_inputs.corpus.train), size=BATCH)])
        mask = (ids != padding).long()
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                wanted = _encode(original, head, ids, mask)
            distance, states = _losses(_encode(deeper, head, ids, mask), wanted, times, mask)
        optimizer.zero_grad()
        (COSINE * distance + states).backward()
        optimizer.step()
        schedule.step()
        if step % _LOG_EVERY == 0 or step + 1 == steps:
            print(f"deeper teacher: step {step}, cosine {1 - distance.item():.3f}", file=sys.stderr, flush=True)


def _encode(model: nn.Module, head: SentenceHead, ids: Tensor, mask: Tensor) -> Encoded:
    backbone = family_of(model.config.model_type).backbone(model)
    out = backbone(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    vectors = head(out.hidden_states[-1], mask)
    return Encoded(nn.functional.normalize(vectors, dim=-1), out.hidden_states)


def _losses(deeper: Encoded, wanted: Encoded, times: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    """1 - mean cosine of the vectors; squared distance of the states behind every `times`-th layer, per element."""
    distance = 1 - (deeper.vectors * wanted.vectors).sum(-1).mean()
    weights = mask[..., None] / (mask.sum() * wanted.states[0].shape[-1])
    pairs = zip(deeper.states[times::times], wanted.states[1:], strict=True)
    return distance, sum(((ours.float() - theirs.float()).square() * weights).sum() for ours, theirs in pairs)
