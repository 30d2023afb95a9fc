"""The decoder study: what is available, which layers go, tokens saved, and a tiny one from end to end."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from study_fakes import study_options
from support.tiny_decoder import write_decoder, write_text
from transformers import AutoModelForCausalLM, LlamaConfig

from experiments.quality import decoder_list, decoder_study, decoder_tables, tokens_saved
from experiments.quality.comparison import Entry, spec
from experiments.quality.decoder_arms import DECODER_ARMS, DECODER_BASE, SIZES, SMOLLM2
from experiments.quality.pool import Pool, spawner
from experiments.quality.shallow_teacher import first_layers
from experiments.quality.tokens_saved import Reach
from homodistil.config.shipped import RECIPES
from homodistil.models.known_configs import known_config

ROOT = Path(__file__).resolve().parents[2]


def _plan(tmp_path, layers: int, *arguments: str) -> decoder_study.DecoderStudy:
    options = study_options(tmp_path, "decoder", *arguments)
    teacher = known_config("HuggingFaceTB/SmolLM2-135M")
    teacher.num_hidden_layers = layers
    return decoder_study.plan(options, decoder_study.teacher_overrides(options, SMOLLM2), teacher)


@pytest.mark.parametrize(("layers", "kept"), [(30, [19, 11]), (12, [7, 3])])
def test_every_arm_is_there_or_its_refusal_and_sizes_are_alike(tmp_path, layers, kept):
    study = _plan(tmp_path, layers)
    labels = {f"{name}/{size}" for name in DECODER_ARMS for size in SIZES}
    assert {entry.label for entry in study.entries} | set(study.refused) == labels
    assert {"none_gradual/0.7", "none_one_shot/0.5", "layers_kl/0.7", "layers_kl/0.5", "random_kl/0.5"} <= set(
        study.parameters
    )
    for size in SIZES:
        numbers = [study.parameters[entry.label] for entry in study.entries if entry.width == size]
        assert max(numbers) < 1.1 * min(numbers)
    options = study_options(tmp_path, "decoder")
    shallow = [spec(options, e, 1e-3, 0).config() for e in study.entries if e.arm.name == "layers_kl"]
    assert [config.student.num_hidden_layers for config in shallow] == kept
    refitted = [spec(options, e, 1e-3, 0).config() for e in study.entries if e.arm.name == "layers_refit"]
    assert [config.student for config in refitted] == [config.student for config in shallow]
    assert {config.pruning.compensation for config in refitted} == {"refit"}
    assert {config.pruning.compensation for config in shallow} == {"none"}
    for label, reason in study.refused.items():  # what the product does not have yet says so by its field
        name = label.partition("/")[0]
        assert reason.startswith("pruning.importance: " if name == "minitron" else "pruning.compensation: "), label


def test_embeddings_that_leave_no_room_for_layers_are_named(tmp_path):
    study = _plan(tmp_path, 4, "--sizes", "0.5", "--arms", "layers_kl", "random_kl")
    assert [entry.label for entry in study.entries] == ["random_kl/0.5"]
    assert study.refused["layers_kl/0.5"].startswith("no number of layers comes within 10% of ")


def test_the_default_is_the_strongest_compensation_that_is_there():
    entries = [Entry(DECODER_ARMS[name], "0.7") for name in ("none_gradual", "refit_one_shot", "full_gradual")]
    study = decoder_study.DecoderStudy(entries)
    assert study.default("0.7").arm.name == "refit_one_shot" and study.default("0.5") is None
    assert decoder_study.peers(study, "0.7") == []


def test_the_products_defaults_change_no_arm():
    pinned = {override.split("=")[0] for override in DECODER_BASE}
    recipe = yaml.safe_load((RECIPES / "quickstart-decoder.yaml").read_text())
    decided = {f"{section}.{name}" for section in ("pruning", "loss", "run", "data") for name in recipe[section]}
    assert decided - {"run.name"} <= pinned


def test_the_first_layers_of_a_teacher_are_a_folder_of_their_own(tmp_path):
    text = write_text(tmp_path / "text")
    teacher = write_decoder(tmp_path / "teacher", LlamaConfig, text, num_hidden_layers=3)
    assert first_layers(str(teacher), 3, tmp_path, tmp_path) == str(teacher)
    folder = first_layers(str(teacher), 2, tmp_path, tmp_path)
    assert folder == first_layers(str(teacher), 2, tmp_path, tmp_path) != str(teacher)
    whole, shallow = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (teacher, folder))
    assert shallow.config.num_hidden_layers == 2 and len(shallow.model.layers) == 2
    ids = torch.arange(12)[None]
    with torch.no_grad():
        states = whole(ids, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(shallow(ids).logits, shallow.lm_head(whole.model.norm(states)))
    assert (Path(folder) / "tokenizer.json").read_text() == (teacher / "tokenizer.json").read_text()


def test_tokens_to_reach_a_loss_are_interpolated_in_the_logarithm_of_the_length():
    reach = Reach(None, 3.0, 1000, {1: 3.4, 2: 3.2, 4: 2.8})
    assert reach.factor == pytest.approx(2 * math.sqrt(2)) and reach.in_words == "2.83"
    assert Reach(None, 3.0, 1000, {1: 2.9}).in_words == "<= 1"
    assert Reach(None, 3.0, 1000, {1: 3.4, 2: 3.3, 4: 3.1}).factor is None
    assert Reach(None, 3.0, 1000, {1: 3.4, 2: 3.3, 4: 3.1}).in_words == "> 4"
    assert Reach(None, 3.0, 1000, {1: 3.4, 2: 3.0}).factor == pytest.approx(2)
    assert Reach(None, 3.0, 1000, {}).in_words == "-"


class _LongerPool:
    """Answers longer runs from a table of (method, length) -> loss."""

    def __init__(self, losses: dict) -> None:
        self.losses, self.asked = losses, []

    def run(self, phase, jobs, later=None) -> list:
        answers = []
        for job in jobs:
            name, length, _, rate, _, seed = job.label.split()
            self.asked.append((name, int(length[1:]), job.spec.config().train.steps, float(rate), int(seed)))
            answers.append(_measured(self.losses[name, int(length[1:])]))
        return answers


def _measured(loss: float) -> dict:
    half = {"lm_loss": loss, "kl_to_teacher": loss / 3, "perplexity": math.exp(loss), "bits_per_byte": 1.0}
    return {"validation": half, "test": half, "tokens": 65536, "cpu_s": 9.0, "parameters": 100}


def _entry(name: str, *losses: float) -> Entry:
    entry = Entry(DECODER_ARMS[name], "0.7", {3e-4: losses[0]}, 3e-4, start=DECODER_BASE)
    entry.runs = {seed: _measured(loss) for seed, loss in enumerate(losses)}
    return entry


def test_peers_train_on_until_they_reach_our_loss(tmp_path):
    ours, fast, slow, never = (
        _entry(name, *losses)
        for name, losses in {
            "none_gradual": (3.0, 3.01, 3.02),
            "layers_kl": (2.9, 2.9, 2.9),
            "random_kl": (3.4, 3.4, 3.4),
            "none_one_shot": (4.0, 4.0, 4.0),
        }.items()
    )
    losses = {("random_kl/0.7", 2): 3.2, ("random_kl/0.7", 4): 2.8}
    losses |= {("none_one_shot/0.7", 2): 3.9, ("none_one_shot/0.7", 4): 3.8}
    pool, options = _LongerPool(losses), study_options(tmp_path, "decoder", "--steps", "10")
    reached = tokens_saved.run(pool, options, [fast, slow, never], ours)
    assert [course.in_words for course in reached] == ["<= 1", "2.83", "> 4"]
    lengths = [("random_kl/0.7", 2, 20), ("none_one_shot/0.7", 2, 20), ("random_kl/0.7", 4, 40)]
    assert [asked[:3] for asked in pool.asked] == [*lengths, ("none_one_shot/0.7", 4, 40)]
    assert {asked[3:] for asked in pool.asked} == {(3e-4, 0)}

    entries = [ours, fast, slow]
    study = decoder_study.DecoderStudy(
        entries,
        {"minitron/0.7": "pruning.importance: found 'activation'"},
        {entry.label: 95_507_040 for entry in entries},
        _measured(2.5) | {"parameters": 134_515_008},
        reached[:2],
    )
    text = decoder_tables.report(study, study_options(tmp_path, "decoder", "--sizes", "0.7"), {})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    by_name = {tuple(line[:2]): line for line in lines}
    label = DECODER_ARMS["random_kl"].label
    assert by_name[label, "95,507,040"][2:6] == ["0.0003", "3.400 +- 0.000", "1.133 +- 0.000", "30.0 +- 0.0"]
    assert by_name["0.7", label][2:] == ["3.000", "3.400", "3.200", "2.800", "2.83", "185,364"]
    assert by_name["teacher", "134,515,008"][3] == "2.500"
    assert "better than its peers by more than two standard deviations in 2 of 4 rows" in text
    assert text.index("## Verdict") < text.index("## 0.7 of the parameters")
    assert "* minitron/0.7: pruning.importance: found 'activation'" in text
    rows = {(row["variant"], row["metric"]): row for row in decoder_tables.rows(study, {})}
    assert rows["random_kl", "lm_loss"]["values"] == [3.4, 3.4, 3.4]
    assert rows["random_kl", "tokens to reach ours"]["value"] == pytest.approx(2 * math.sqrt(2))


def test_the_list_names_every_run_without_making_one(tmp_path):
    options = study_options(tmp_path, "decoder", "--list", "--sizes", "0.5", "--arms", "none_one_shot", "minitron")
    text = decoder_list.listing(options)
    assert "none_one_shot/0.5 | 38,348,160 | 0.00015 0.0003 0.0006 | 5.5 |" in text
    assert "minitron/0.5" in text and "hours with 2 processes" in text
    assert not any(tmp_path.iterdir())


def test_a_tiny_study_from_end_to_end(tmp_path, cache_dir):
    """Two of three layers of a small decoder, corrected; made narrower in events, made shallower by block influence."""
    text = write_text(tmp_path / "text")
    teacher = write_decoder(tmp_path / "teacher", LlamaConfig, text, num_hidden_layers=3)
    arguments = ["--steps=3", "--seeds", "0", "--rates", "1e-3", "--sizes", "0.7", "--workers=1", "--layers=2"]
    arguments += ["--quick", "--arms", "none_gradual", "layers_kl", f"--teacher={teacher}"]
    arguments += ["--set", f"data.sources=[{text}]", "data.seq_len=16", f"data.cache_dir={tmp_path / 'cache'}"]
    options = study_options(tmp_path / "work", "decoder", *arguments)
    lines: list[str] = []
    start = spawner(options.work, ROOT / "ds_configs" / "zero2_fp32.json")
    with Pool(options.work, start, 1, lines.append) as pool:
        study = decoder_study.run(pool, options)
    assert not pool.errors, (pool.errors, (options.work / "worker-0.log").read_text()[-3000:])
    assert {entry.arm.name: list(entry.runs) for entry in study.entries} == dict.fromkeys(options.arms, [0])
    assert study.default("0.7").arm.name == "none_gradual" and len(study.saved) == 1
    measured = {entry.arm.name: entry.runs[0] for entry in study.entries}
    for entry in study.entries:
        test = entry.runs[0]["test"]
        assert entry.runs[0]["parameters"] == study.parameters[entry.label]
        assert test["perplexity"] == pytest.approx(math.exp(test["lm_loss"])) and test["kl_to_teacher"] > 0
        assert entry.runs[0]["flops"] > 0
    assert measured["none_gradual"]["validation"]["lm_loss"] != measured["none_gradual"]["test"]["lm_loss"]
    assert study.teacher["test"]["kl_to_teacher"] == 0 and study.teacher["parameters"] > 1.2 * 33_000
    report = decoder_tables.report(study, options, pool.errors)
    assert "ShortGPT" in report and "Tokens saved" in report and "nan" not in report

    def no_start(connection, number):
        raise AssertionError("a worker was started though all is done")

    with Pool(options.work, no_start, 1, lines.append) as pool:
        assert decoder_study.run(pool, options).saved == study.saved
