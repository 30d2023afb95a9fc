"""Halves of the held-out text, addresses of runs, and methods that are what their names say."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import yaml
from transformers import BertConfig

from experiments.quality.arms import ARMS, BASE, DEFAULT_ARM, SHAPES
from experiments.quality.measured_run import Part, halves
from experiments.quality.specs import RunSpec
from homodistil.config import command_line
from homodistil.config.schema import OPTIONS, value_of
from homodistil.config.shipped import RECIPES
from homodistil.training.inputs import RunInputs
from homodistil.training.schedule_choice import OF_GRADUAL_SCHEDULES
from homodistil.training.settle import settle


def test_the_halves_are_disjoint_cover_everything_and_take_turns():

    @dataclass(frozen=True)
    class Corpus:
        heldout: object

    rows = torch.arange(21).view(7, 3).numpy()
    run_inputs = RunInputs("teacher", None, Corpus(Part(rows, np.arange(7))), torch.device("cpu"))
    validation, test = (half.corpus.heldout for half in halves(run_inputs))
    assert validation[range(len(validation))].tolist() == rows[:3].tolist()
    assert test[range(len(test))].tolist() == rows[3:].tolist()
    validation, test = (half.corpus.heldout for half in halves(run_inputs, limit=2))
    assert validation[[0, 1]].tolist() == rows[:2].tolist() and len(validation) == 2
    assert test[[1]].tolist() == rows[[4]].tolist() and len(test) == 2

    blocks = np.arange(150)[:, None]  # sources lie one after the other: 64 here, 64 there, the rest here again
    run_inputs = RunInputs("teacher", None, Corpus(Part(blocks, np.arange(150))), torch.device("cpu"))
    validation, test = (half.corpus.heldout for half in halves(run_inputs))
    assert test[range(len(test))].flatten().tolist() == list(range(64, 128))
    assert validation[range(len(validation))].flatten().tolist() == [*range(64), *range(128, 150)]


def test_a_run_is_addressed_by_what_decides_its_result():

    def key(*parts, steps: int = 5, lr: float = 3e-3, seed: int = 0) -> str:
        return RunSpec.of("x", BASE, SHAPES["half"].overrides, parts, steps=steps, lr=lr, seed=seed).key

    assert key() == key("run.name=another", "train.log_every_steps=1", "data.workers=2") == key("loss.kl=1.0")
    others = [key("loss.kl=0.5"), key(steps=6), key(lr=6e-3), key(seed=1), *map(key, ARMS["one_shot"].overrides)]
    assert len({key(), *others}) == len(others) + 1


def test_the_products_defaults_change_no_arm():
    """What the quickstart decides about pruning and losses is pinned, or a new default would rename all old results."""

    pinned = {override.split("=")[0] for override in BASE}
    quickstart = yaml.safe_load((RECIPES / "quickstart.yaml").read_text())
    decided = {f"{section}.{name}" for section in ("pruning", "loss", "run") for name in quickstart.get(section, {})}
    assert decided - {"run.name"} <= pinned


def test_the_default_arm_is_what_the_product_does_by_default():
    """But for the size of the micro-batch, gradual schedules' fields, which mean nothing here, and what is not run."""
    arm = command_line.parse([*BASE, *SHAPES["half"].overrides, *ARMS[DEFAULT_ARM].overrides])
    product = command_line.parse([*SHAPES["half"].overrides, "run.compare=[]"])
    product.given -= {f"pruning.{name}" for name in OF_GRADUAL_SCHEDULES}  # the quickstart's, which is gradual
    product.pruning.schedule = "auto"
    for config in (arm, product):
        settle(config, BertConfig(num_hidden_layers=2, hidden_size=128, num_attention_heads=2))
    of_this_study = {*(f"pruning.{name}" for name in OF_GRADUAL_SCHEDULES), "train.micro_batch_size"}
    of_this_study |= {"train.save_every_steps", "train.eval_every_steps", "run.keep_checkpoints"}
    assert {name for name in OPTIONS if value_of(arm, name) != value_of(product, name)} <= of_this_study


def test_no_two_arms_are_the_same_run():

    parts = ((BASE, SHAPES["half"].overrides, arm.overrides) for arm in ARMS.values())
    assert len({RunSpec.of("x", *part, steps=300, lr=3e-3, seed=0).key for part in parts}) == len(ARMS)


def test_rivals_have_the_losses_of_their_recipes():

    # What the table's notes say: everybody has an MLM head, and nobody pays for logits of all rows.
    differs = {"tinybert": {"mlm"}, "minilmv2": {"mlm"}, "distilbert": {"kl_positions"}}
    differs["distilbert_layers"] = differs["distilbert"]
    for arm in ARMS.values():
        if arm.recipe:
            shape = () if arm.own_shape else SHAPES["half"].overrides
            config, recipe = (
                command_line.parse([*BASE, *shape, *arm.overrides]),
                command_line.parse([f"recipe={arm.recipe}"]),
            )
            ours, theirs = dataclasses.asdict(config.loss), dataclasses.asdict(recipe.loss)
            theirs |= {"attention_target": "scores"} if theirs["attention_target"] == "auto" else {}  # of encoders
            weights = ("mlm", "kl", "hidden", "attention", "embedding", "cosine", "relations")
            without = set() if ours["relations"] else {"relation_heads", "relation_layer"}
            if not (ours["hidden"] or ours["embedding"]):
                without |= {"projection", "projection_learned"}
            unlike = {name for name in ours if ours[name] != theirs[name]} - without
            assert unlike == differs.get(arm.name, set()), arm.name
            assert any(ours[name] for name in weights)
            assert config.pruning.schedule == recipe.pruning.schedule, arm.name
            assert config.student.num_hidden_layers == (1 if arm.own_shape else None)
