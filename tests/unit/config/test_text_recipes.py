"""Recipes for embedders and classifiers: their sizes, their plans without a hub, and two real steps of each task."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
)

from homodistil.config.command_line import parse
from homodistil.config.shipped import RECIPES, engine_path
from homodistil.distill.teacher_sharding import num_parameters
from homodistil.engine.build import init_ranks, load_engine_config, resolve_engine_config
from homodistil.planning.cluster import find_cluster
from homodistil.planning.plan import make_plan
from homodistil.training.inputs import prepare_inputs
from homodistil.training.run import DistillationRun
from homodistil.training.teacher_checks import check_plannable

HUB = ("bge-small-half", "e5-one-language", "modernbert-embedder", "reranker-half", "ner-half")
WORDS = "the a whale ship sea captain white old sails deep over under and harpoon storm night crew of".split()


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", ["minilm-quarter", "minilm-2-layers", *HUB])
def test_sizes_are_those_of_the_first_lines(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    comment = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    resolved = check_plannable(parse([f"recipe={name}"]))
    family = resolved.family
    with torch.device("meta"):
        student = family.student_config(resolved.teacher_config, resolved.target)
        stock = family.empty(student, resolved.task.head)
    shape = family.shape(stock.config)
    assert f"hidden {shape.hidden_size}, ffn {shape.intermediate_size}" in comment
    assert f"{shape.num_attention_heads} heads of {shape.head_dim}" in comment
    layers = shape.num_hidden_layers
    assert f"all {layers} layers" in comment or f", {layers} layers." in comment
    assert re.search(rf"\b{num_parameters(stock) / 1e6:.1f} M\b", comment), num_parameters(stock)


@pytest.mark.parametrize("name", HUB)
def test_a_plan_needs_no_hub(name):
    plan = make_plan(check_plannable(parse([f"recipe={name}"])), load_engine_config(engine_path(None)), H100)
    assert plan.peak_bytes < 80e9 and len(plan.stretches) == 1  # cut at once


H100 = find_cluster("H100", 1)


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    """Teachers with the real ones' heads, each an eighth as wide, in three layers; sentences, and pairs of them."""
    folder = tmp_path_factory.mktemp("materials")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    sizes = {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 12, "num_hidden_layers": 3}
    config = BertConfig(vocab_size=len(names), initializer_range=0.1, **sizes)
    torch.manual_seed(0)
    kinds = {
        "embedding": BertModel,
        "scores": BertForSequenceClassification,
        "token_scores": BertForTokenClassification,
    }
    for task, kind in kinds.items():
        config.num_labels = 9 if task == "token_scores" else 1
        kind(config).save_pretrained(folder / task)
        BertTokenizer({word: i for i, word in enumerate(names)}).save_pretrained(folder / task)
    draw = random.Random(0)
    lines = [{name: " ".join(draw.choices(WORDS, k=8)) for name in ("text", "query", "passage")} for _ in range(80)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.process
@pytest.mark.parametrize("name", ["bge-small-half", "reranker-half", "ner-half"])
def test_two_steps_in_an_eighth_of_the_width(materials, name, tmp_path):
    recipe = parse([f"recipe={name}"])
    small = [f"teacher.name={materials / recipe.data.task}", f"data.sources=[{materials / 'pairs.jsonl'}]"]
    small += [f"data.cache_dir={tmp_path / 'cache'}", "data.seq_len=24", "data.workers=0", "data.heldout_fraction=0.2"]
    small += ["student.hidden_size=24", "student.intermediate_size=96", "pruning.compensation_sequences=16"]
    small += ["train.steps=2", "train.global_batch_size=4", "train.micro_batch_size=2", "train.log_every_steps=1"]
    small += ["train.save_every_steps=0", "train.eval_every_steps=0", "pruning.calibration_batches=1"]
    config = parse([f"recipe={name}", *small])
    engine_config = resolve_engine_config({"zero_optimization": {"stage": 2}}, config.train, 1)
    run = DistillationRun(config, engine_config, prepare_inputs(config, init_ranks()), tmp_path / "run", "a test")
    row = run.run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    terms = {"pooled_cosine", "hidden"} if config.data.task == "embedding" else set(config.loss.weights)
    assert [line["step"] for line in steps] == [1, 2] and {f"loss/{term}" for term in terms} <= set(steps[0])
    assert run.student.widths["hidden"] == 24 and run.resolved.config.pruning.schedule == "one_shot"
    measured = {"embedding": "cosine_to_teacher", "scores": "score_mse", "token_scores": "token_agreement"}
    assert measured[config.data.task] in row
