"""Block influence of a study's teacher (pruning/block_influence.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM

from experiments.quality.jobs import Job
from experiments.quality.specs import RunSpec, content_hash
from homodistil.data.batch import Batch
from homodistil.models import family_of
from homodistil.models.activations import ActivationHooks, ActivationVisitor
from homodistil.pruning.block_influence import block_influence


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
        family = family_of(model.config.model_type)
        hooks, num_layers = ActivationHooks(model, family), len(family.layers(model))

        def show(batch: Batch, visitor: ActivationVisitor) -> None:
            with hooks.shown_to(visitor):
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)

        return {"influence": block_influence(show, num_layers, batches)}
