"""Recipes for models beside BERT: their sizes, their plans without a hub, and two real steps of each.

The teacher of the steps is of the same class, an eighth as wide and a few layers deep; sizes of the recipe shrink with
it, and everything else of the recipe is as it is.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
import transformers
from support.tiny_decoder import make_tokenizer, write_text
from transformers import BertTokenizer, PretrainedConfig

from homodistil.config.command_line import parse
from homodistil.config.schema import RunConfig
from homodistil.config.shipped import RECIPES, engine_path
from homodistil.distill.teacher_sharding import num_parameters
from homodistil.engine.build import init_ranks, load_engine_config, resolve_engine_config
from homodistil.models import FAMILIES, family_of
from homodistil.models.known_configs import known_config
from homodistil.planning.cluster import find_cluster
from homodistil.planning.plan import make_plan
from homodistil.training.inputs import prepare_inputs
from homodistil.training.resolve import resolve_run
from homodistil.training.run import DistillationRun
from homodistil.training.teacher_checks import check_plannable

NAMES = (
    "roberta-half",
    "xlmr-half",
    "modernbert-half",
    "modernbert-22m",
    "smollm2-half",
    "qwen3-0.6b-to-0.3b",
    "llama-3.2-1b-half",
)
PACKAGED = "quickstart-decoder"
_HUB_NAMES = {"embedded:smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
NARROWER = 8
WORDS = "the a whale ship sea captain white old sails deep over under and harpoon storm night crew of".split()


def known(name: str) -> str:
    """`name`, if the family of its teacher is there."""
    if name.startswith("modernbert") and "modernbert" not in FAMILIES:
        pytest.skip("there is no family for ModernBERT")
    return name


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def teacher_config(config: RunConfig) -> PretrainedConfig:
    """Of the real teacher."""
    return known_config(_HUB_NAMES.get(config.teacher.name, config.teacher.name))


@pytest.mark.parametrize("name", [*NAMES, PACKAGED])
def test_the_target_is_what_the_recipe_says(name):
    """Layers, sizes and parameters in its first lines are those of the stock model."""
    text = (RECIPES / f"{known(name)}.yaml").read_text()
    comment = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    config = parse([f"recipe={name}"])
    resolved = resolve_run(config, teacher_config(config))
    with torch.device("meta"):
        stock = resolved.family.empty_model(resolved.family.student_config(resolved.teacher_config, resolved.target))
    shape = resolved.family.shape(stock.config)
    layers, heads = shape.num_hidden_layers, f"{shape.num_attention_heads} heads of {shape.head_dim}"
    assert f"hidden {shape.hidden_size}, ffn {shape.intermediate_size}" in comment and heads in comment
    assert re.search(rf"(all {layers}|{layers} of {resolved.teacher_config.num_hidden_layers}) layers", comment)
    assert f"{num_parameters(stock) / 1e6:.1f} M" in comment


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_needs_no_hub(name):
    config = parse([f"recipe={known(name)}"])
    plan = make_plan(check_plannable(config), load_engine_config(engine_path(None)), find_cluster("H100", 8))
    assert plan.stretches[-1].hidden_size == config.student.hidden_size and plan.peak_bytes < 80e9


def narrow_teacher(config: RunConfig, folder: Path, text: Path) -> PretrainedConfig:
    """A teacher with the real one's heads, each an eighth as wide, and its tokenizer."""
    real = teacher_config(config)
    is_causal = family_of(real.model_type).is_causal
    tokenizer = make_tokenizer(text) if is_causal else BertTokenizer(_vocabulary())
    sizes = {"hidden_size": real.hidden_size, "intermediate_size": real.intermediate_size}
    sizes |= {"head_dim": real.head_dim} if is_causal else {}
    values = real.to_dict() | {name: size // NARROWER for name, size in sizes.items()}
    values |= {"num_hidden_layers": 3, "vocab_size": len(tokenizer), "layer_types": None}
    values |= {name: None for name in values if name.endswith("_token_id")}
    values |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = family_of(real.model_type).empty_model(type(real)(**values))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name.lower() else 0.0, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.config


def _vocabulary() -> dict[str, int]:
    return {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}


def two_steps(recipe_name: str, folder: Path) -> RunConfig:
    """The recipe's config with its sizes and its text made small, in two steps that both may prune."""
    recipe, text = parse([f"recipe={recipe_name}"]), write_text(folder / "text", num_documents=40)
    if not family_of(teacher_config(recipe).model_type).is_causal:
        draw = random.Random(0)
        for path in text.glob("*.txt"):
            path.write_text(" ".join(draw.choices(WORDS, k=90)))
    narrow_teacher(recipe, folder / "teacher", text)
    student, pruning = recipe.student, recipe.pruning
    small = [f"teacher.name={folder / 'teacher'}", f"data.sources=[{text}]", f"data.cache_dir={folder / 'cache'}"]
    small += [f"student.{size}={getattr(student, size) // NARROWER}" for size in ("hidden_size", "intermediate_size")]
    small += [
        f"pruning.{what}={max(1, getattr(pruning, what) // NARROWER)}" for what in ("width_multiple", "ffn_multiple")
    ]
    small += ["student.num_hidden_layers=2", "student.init_layers=[]"] if student.num_hidden_layers else []
    small += ["pruning.head_dim_multiple=1", "pruning.compensation_sequences=8", "data.seq_len=16", "data.workers=0"]
    small += ["data.heldout_fraction=0.1", "train.steps=2", "train.global_batch_size=4", "train.micro_batch_size=2"]
    small += ["train.save_every_steps=0", "train.eval_every_steps=0", "train.log_every_steps=1"]
    small += ["pruning.end_fraction=1", "pruning.interval_steps=1", "pruning.max_event_fraction=1"]
    return parse([f"recipe={recipe_name}", *small])


@pytest.mark.process
@pytest.mark.parametrize("name", [*NAMES, PACKAGED])
def test_two_steps_in_an_eighth_of_the_width(name, tmp_path):
    """Every weighted term, and no other, is trained; the export has the target's shape and the student's logits."""
    config = two_steps(known(name), tmp_path)
    engine_config = resolve_engine_config({"zero_optimization": {"stage": 2}}, config.train, 1)
    run = DistillationRun(config, engine_config, prepare_inputs(config, init_ranks()), tmp_path / "run", "a test")
    run.run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        terms = {key.removeprefix("loss/") for key in line if key.startswith("loss/") and key.count("/") == 1}
        assert terms == {*config.loss.weights, "total"} and line["optim/grad_norm"] > 0
    events = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    steps_of_events = [0] if config.pruning.schedule == "one_shot" else [1, 2]
    if config.student.num_hidden_layers:
        steps_of_events = [0, *steps_of_events]  # layers leave first
    assert [json.loads(event)["step"] for event in events] == steps_of_events
    family = run.resolved.family
    exported = getattr(transformers, family.auto_class).from_pretrained(tmp_path / "run" / "export").eval()
    shape = family.shape(exported.config)
    assert (shape.hidden_size, shape.intermediate_size) == (
        config.student.hidden_size,
        config.student.intermediate_size,
    )
    assert shape.num_attention_heads == config.student.num_attention_heads
    assert shape.num_key_value_heads == (config.student.num_key_value_heads or shape.num_attention_heads)
    assert shape.num_hidden_layers == (config.student.num_hidden_layers or 3)
    batch = run.gap.batches[0]
    with torch.no_grad():
        logits = exported(batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
    torch.testing.assert_close(logits[batch.target_index], run.student.predict(batch), rtol=1e-4, atol=1e-4)
