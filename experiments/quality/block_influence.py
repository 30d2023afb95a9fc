"""Which layers a model misses least: block influence (ShortGPT, arXiv 2403.03853, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM

from experiments.quality.jobs import Job
from experiments.quality.specs import RunSpec, content_hash
from homodistil.data.batch import Batch
from homodistil.models import family_of


@torch.no_grad()
def block_influence(model: nn.Module, layers: Sequence[nn.Module], batches: Iterable[Batch]) -> list[float]:
    """1 - cosine of what goes into each layer and what comes out of it, mean over valid tokens: 0, it changes nothing.

    Args:
        model: a stock model in evaluation mode, on the batches' device.
        layers: its layers, in order.
    """
    sums, ends = torch.zeros(len(layers), dtype=torch.float64), []

    def keep(_module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        after = output[0] if isinstance(output, tuple) else output
        ends.append(1 - cosine_similarity(inputs[0].float(), after.float(), dim=-1))

    hooks, num_tokens = [layer.register_forward_hook(keep) for layer in layers], 0
    for batch in batches:
        ends.clear()
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        valid = batch.attention_mask.bool()
        sums += torch.stack([end[valid].double().sum() for end in ends]).cpu()
        num_tokens += int(valid.sum())
    for hook in hooks:
        hook.remove()
    return (sums / num_tokens).tolist()


def most_influential(influence: Sequence[float], num_layers: int) -> list[int]:
    """The layers that stay, ascending; of equal ones the first."""
    ranked = sorted(range(len(influence)), key=lambda i: (-influence[i], i))
    return sorted(ranked[:num_layers])


@dataclass(frozen=True)
class BlockInfluence(Job):
    """That of the corrected teacher on the first training batches; `spec` is any run that starts from it."""

    spec: RunSpec

    @property
    def label(self) -> str:
        return "block influence"

    def folder(self, work: Path) -> Path:
        config = self.spec.config().to_dict()
        calibration = [config["train"]["global_batch_size"], config["pruning"]["calibration_batches"]]
        return work / "influence" / content_hash([config["teacher"], config["data"], *calibration])

    def execute(self, context, folder: Path) -> dict:
        config = self.spec.config()
        run_inputs = context.settled_inputs(config)
        model = AutoModelForCausalLM.from_pretrained(run_inputs.teacher, dtype="float32").eval().to(context.device)
        prefetcher, size = run_inputs.prefetcher(config, config.train.seed), config.train.global_batch_size
        batches = (
            batch for i in range(config.pruning.calibration_batches) for batch in prefetcher.micro_batches(i * size)
        )
        return {"influence": block_influence(model, family_of(model.config.model_type).layers(model), batches)}
