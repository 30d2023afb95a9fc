"""The study of a sentence embedder: its methods are what their names say, its teacher of more layers, and its page."""

from __future__ import annotations

import pytest
import torch
from study_fakes import FakePool, measured, study_options
from support.small_job import arguments, make_materials
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from experiments.quality import embedder_study, embedder_tables
from experiments.quality.comparison import exports
from experiments.quality.deeper_teacher import deeper_embedder, repeat_layers
from experiments.quality.embedder_arms import EMBEDDER_ARMS, EMBEDDER_BASE, embedder_arms
from experiments.quality.specs import RunSpec
from experiments.quality.statistics import choice_loss
from homodistil.config import command_line
from homodistil.errors import UserError

LEVEL = {"ours": 0.9, "selection": 0.8, "random_init": 0.5, "layers": 0.85, "layers_refit": 0.87}
LEVEL |= {"ours_cut": 0.7, "selection_cut": 0.4, "layers_copied": 0.86, "layers_refit_mse": 0.84}


class _Pool(FakePool):
    """Answers runs by their method, and probes of an export with as much again as its cosine."""

    errors: dict = {}

    def __init__(self, work) -> None:
        super().__init__(self._answer, work)

    def _answer(self, label: str, rate: float, seed: int) -> dict:
        cosine = LEVEL[label.split("/")[0]] + 0.001 * seed
        half = {"vector_cosine": cosine, "recall_at_10": cosine - 0.2}
        return measured(1.0, 1.0) | {"validation": half, "test": half}

    def run(self, phase, jobs, later=None) -> list:
        if phase == "teacher":
            return [{"parameters": 2000}]
        if phase != "probes":
            return super().run(phase, jobs, later)
        return [{"scores": {"cosine": LEVEL.get(job.label.split("/")[0], 1.0)}} for job in jobs]


def test_methods_are_what_their_names_say():
    configs = {
        name: RunSpec.of(name, EMBEDDER_BASE, arm.overrides, steps=9, lr=1e-3, seed=0).config()
        for name, arm in EMBEDDER_ARMS.items()
    }
    assert {c.data.task for c in configs.values()} == {"embedding"}
    assert configs["ours"].loss.weights == {"hidden": 1.0, "pooled_cosine": 10.0}
    for name in ("selection", "random_init"):
        assert configs[name].loss == configs["ours"].loss and configs[name].student.hidden_size == 192
    assert configs["selection"].pruning.compensation == "none" and configs["ours"].pruning.compensation == "full"
    assert configs["layers"].loss.weights == {"pooled_mse": 1920.0} and configs["layers"].student.hidden_size is None
    assert configs["layers"].student.num_hidden_layers == configs["layers_refit"].student.num_hidden_layers == 2
    assert configs["layers_refit"].loss == configs["ours"].loss
    assert configs["layers_refit"].pruning.compensation == "refit" and configs["layers"].pruning.compensation == "none"
    assert configs["layers_refit"].student.layer_choice == "influence"
    assert configs["layers_copied"].pruning.compensation == "none"
    assert configs["layers_copied"].student == configs["layers_refit_mse"].student == configs["layers_refit"].student
    assert configs["layers_copied"].loss == configs["ours"].loss != configs["layers_refit_mse"].loss
    assert configs["layers"].student.init_layers == [1, 4] and configs["random_init"].student.init == "random"


def test_of_twelve_layers_the_rival_keeps_those_of_its_example():
    arms = embedder_arms(12)
    config = RunSpec.of("x", EMBEDDER_BASE, arms["layers"].overrides, steps=9, lr=1e-3, seed=0).config()
    assert config.student.init_layers == [1, 4, 7, 10] and config.student.num_hidden_layers == 4
    assert arms["layers"].label == "sentence-transformers: 4 of 12 layers, MSE"
    assert {name for name in arms if arms[name].overrides != EMBEDDER_ARMS[name].overrides} == {
        *("layers", "layers_refit", "layers_copied", "layers_refit_mse")
    }


def _embedder_config(folder, run_dir):
    make_materials(folder)
    fields = [*arguments(folder, run_dir)[2:], "data.task=embedding", "loss.kl=0", "loss.mlm=0", "train.seed=0"]
    return command_line.parse([field for field in fields if "=" in field and not field.startswith("--")])


def test_a_deeper_teacher_has_every_layer_in_turn_and_nears_the_vectors(tmp_path, capsys):
    config = _embedder_config(tmp_path, tmp_path / "run")
    original = AutoModelForMaskedLM.from_pretrained(tmp_path / "teacher").eval()
    repeated = repeat_layers(original, 3)
    depth = original.config.num_hidden_layers
    states, sources = torch.randn(2, 5, original.config.hidden_size), [i // 3 for i in range(3 * depth)]
    for layer, source in zip(repeated.bert.encoder.layer, sources, strict=True):
        assert torch.equal(layer(states), original.bert.encoder.layer[source](states))
    assert len({id(layer) for layer in repeated.bert.encoder.layer}) == repeated.config.num_hidden_layers == 3 * depth

    name = deeper_embedder(config, 2 * depth, tmp_path / "work", steps=60)
    deeper, tokenizer = AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    assert deeper.config.num_hidden_layers == 2 * depth
    assert deeper.config.hidden_dropout_prob == original.config.hidden_dropout_prob
    texts = tokenizer(["the quick brown fox", "five boxing wizards jugs"], return_tensors="pt", padding=True)

    def distance(backbone) -> float:
        with torch.no_grad():
            a, b = (encoder(**texts).last_hidden_state.mean(1) for encoder in (original.bert, backbone))
        return 1 - torch.nn.functional.cosine_similarity(a, b).mean().item()

    assert distance(deeper) < 0.5 * distance(repeat_layers(original, 2).bert)
    assert deeper_embedder(config, depth, tmp_path / "work") == config.teacher.name
    capsys.readouterr()
    assert (
        deeper_embedder(config, 2 * depth, tmp_path / "work", steps=60) == name
        and "step" not in capsys.readouterr().err
    )
    with pytest.raises(UserError, match=f"--layers: found {depth + 1}, allowed: a multiple of the {depth}"):
        deeper_embedder(config, depth + 1, tmp_path / "work")


def test_rates_are_chosen_by_the_vectors():
    assert choice_loss({"vector_cosine": 0.9, "recall_at_10": 0.1}) == 1 - 0.9
    assert choice_loss({"mlm_loss": 4.0}) == 4.0 and choice_loss({"lm_loss": 3.0}) == 3.0


def test_the_page(tmp_path):
    options = study_options(tmp_path, "embedder")
    study = embedder_study.run(_Pool(tmp_path), options)
    text = embedder_tables.report(study, options, {})
    assert "| teacher | 2,000 | - | 1.000 | 1.000 | 1.000 | - | - |" in text
    verdict = text.index("Ours is better by more than two standard deviations in ")
    assert text.index("## Verdict") < verdict < text.index("## Results")
    assert (
        "| ours: cut at once, compensated | 1,000 | 0.0005 | 0.901 +- 0.001 | 0.701 +- 0.001 | 0.900 +- 0.000 |" in text
    )
    wanted = (
        "| ours: cut at once, compensated | random init, same loss | cosine to the teacher | +0.400 | 0.003 | yes |"
    )
    assert wanted in text and "| ours, cut alone | selection, cut alone | STS-B | +0.300 | 0.000 | yes |" in text
    layers = (
        "| ours: 2 of 6 layers by block influence, as they were, same loss | sentence-transformers: 2 of 6 layers, MSE "
        "| STS-B | +0.010 |"
    )
    assert layers in text
    assert "Teacher: MiniLM-L6 (embedded:minilm-l6). Every run:" in text
    assert "2 layers at the teacher's width" in text and "nan" not in text
    assert all(len(exports(options, entry)) == 3 for entry in study.entries)
    rows = {(row["variant"], row["metric"]): row for row in embedder_tables.rows(study, {})}
    assert rows["layers", "vector_cosine"]["values"] == [0.85, 0.851, 0.852] and rows["teacher", "cosine"]["value"] == 1
