"""What int8 costs a sentence encoder: Spearman of the cosine on STS-B dev, in torch, ONNX and int8 ONNX.

    python -m benchmarks.int8_similarity embedded:minilm-l6 models/minilm

The second folder is one that `homodistil export` wrote. Sentences are those of `homodistil probe`: the mean of the last
hidden states over a sentence's tokens, 1,500 pairs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from homodistil.config.schema import DataConfig
from homodistil.evaluation.glue.checkpoint import checkpoint_folder
from homodistil.evaluation.glue.metrics import METRICS
from homodistil.evaluation.probe.examples import load_examples
from homodistil.evaluation.probe.features import SentenceFeatures
from homodistil.evaluation.probe.scores import cosine
from homodistil.export.formats.layout import FORMATS
from homodistil.export.formats.runners import onnx_runner


class _Graph(nn.Module):
    """A graph in the place of the model of `SentenceFeatures`."""

    def __init__(self, path: Path, config) -> None:
        super().__init__()
        self.run, self.config = onnx_runner(path, torch.get_num_threads()), config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs["token_type_ids"] = torch.zeros_like(input_ids)
        states = self.run({name: value.numpy() for name, value in inputs.items()})
        return BaseModelOutput(last_hidden_state=torch.from_numpy(states))


def main(checkpoint: str, exported: str) -> None:
    cache_dir = Path(DataConfig().cache_dir).expanduser()
    pairs = load_examples(cache_dir).pairs_dev
    features, vectors = SentenceFeatures(checkpoint_folder(checkpoint, cache_dir)), {}
    for name in ("torch", "onnx", "onnx-int8"):
        if name != "torch":
            features.model = _Graph(Path(exported) / FORMATS[name].file, features.model.config)
        vectors[name] = first, second = [features.encode(texts) for texts in zip(*pairs.texts, strict=True)]
        spearman = METRICS["spearman"](np.asarray(pairs.labels), cosine(first, second))
        same = np.mean([cosine(a, b).mean() for a, b in zip(vectors["torch"], (first, second), strict=True)])
        print(f"{name:10} Spearman {spearman:.4f}, mean cosine with torch's vectors {same:.6f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
