"""The harness on exported decoders: its own scores against sums of stock log-probabilities, and what is refused.

The harness is an extra. Where it is not installed, only what comes before it and behind it is tested.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from support.fork_server import ROOT
from support.small_job import make_materials
from support.tiny_decoder import write_decoder, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from homodistil.errors import UserError
from homodistil.evaluation.lm_eval.command import main
from homodistil.evaluation.lm_eval.result_table import write_table

with_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
QUESTIONS = [
    {"question": "the cat sees", "choices": ["a dog", "the river and then"], "label": 0},
    {"question": "a small bird", "choices": ["finds red", "hears the house"], "label": 1},
    {"question": "the old tree", "choices": ["again slowly", "because"], "label": 1},
]
TEXTS = ["the cat sees a dog.", "a small bird finds the old house and then the river."]
CHOICE = """task: cats
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
metadata: {{version: 1.0}}
"""
TEXT = """task: sentences
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def decoders(tmp_path_factory) -> list[Path]:
    """Two checkpoints, the second with half the neurons."""
    folder = tmp_path_factory.mktemp("decoders")
    text = write_text(folder / "text")
    return [write_decoder(folder / str(n), LlamaConfig, text, intermediate_size=n) for n in (80, 40)]


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    """A folder of two task files with local data."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = {"cats": (CHOICE, QUESTIONS), "sentences": (TEXT, [{"text": text} for text in TEXTS])}
    for name, (task, content) in rows.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in content))
        (folder / f"{name}.yaml").write_text(task.format(data=data))
    return folder


def log_likelihood(folder: Path, context: str, text: str) -> float:
    """Of the tokens of `text` behind those of `context`, or behind the token that ends a text."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    before = tokenizer(context).input_ids or [tokenizer.eos_token_id]
    ids = torch.tensor([before + tokenizer(context + text).input_ids[len(tokenizer(context).input_ids) :]])
    with torch.no_grad():
        logs = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
    return logs.gather(-1, ids[0, 1:, None])[len(before) - 1 :].sum().item()


@with_harness
def test_scores_are_those_of_the_stock_model(decoders, tasks, tmp_path, capsys):
    names, out = list(map(str, decoders)), tmp_path / "out"
    main(["--checkpoint", *names, "--tasks", str(tasks), "--device", "cpu", "--out", str(out)])
    scores = json.loads((out / "lm_eval.json").read_text())
    assert list(scores) == names
    for folder in decoders:
        results = scores[str(folder)]["results"]
        hits = 0
        for row in QUESTIONS:
            likely = [log_likelihood(folder, row["question"], f" {choice}") for choice in row["choices"]]
            hits += likely.index(max(likely)) == row["label"]
        assert results["cats"]["acc,none"] == pytest.approx(hits / len(QUESTIONS))
        nats = -sum(log_likelihood(folder, "", text) for text in TEXTS)
        bits = nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)
        assert results["sentences"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    table = (out / "lm_eval.md").read_text()
    assert table in capsys.readouterr().out and table.count("| sentences | bits_per_byte (lower is better) |") == 1
    with pytest.raises(UserError, match="has the results of another call"):
        main(["--checkpoint", *names, "--tasks", str(tasks), "--out", str(out)])


@with_harness
@pytest.mark.parametrize(
    ("task", "message"),
    [
        pytest.param(
            "no_such_task",
            r"^--tasks: cannot load 'no_such_task' \(KeyError: .*not a registered task",
            marks=pytest.mark.full,  # the harness reads thousands of task files first
        ),
        ("broken.yaml", r"^--tasks: cannot load .*broken\.yaml"),
        ("nowhere.yaml", r"^--tasks: there is no file"),
        ("empty", r"^--tasks: the folder .* has no task file"),
    ],
)
def test_tasks_that_are_none(decoders, tmp_path, monkeypatch, task, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: json\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        main(["--checkpoint", str(decoders[0]), "--tasks", task, "--out", str(tmp_path / "out")])
    assert "\n" not in str(caught.value) and not list((tmp_path / "out").glob("*"))


def test_without_the_extra_it_says_how_to_install_it(decoders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # what an import of a package that is not there looks like
    with pytest.raises(UserError, match=r"^lm-eval: .* install it with pip install 'lm_eval>=0\.4") as caught:
        main(["--checkpoint", str(decoders[0]), "--tasks", "x", "--out", str(tmp_path / "out")])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    (wanted,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["lm-eval"]
    assert str(caught.value).endswith(f"'{wanted}'")


def test_an_encoder_is_refused(tmp_path):
    make_materials(tmp_path)
    with pytest.raises(UserError, match=r"^--checkpoint: .* is a bert, .* use homodistil glue or homodistil squad$"):
        main(["--checkpoint", str(tmp_path / "teacher"), "--tasks", "x", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "0"], "--limit: found '0'"),
        (["--batch-size", "many"], "--batch-size: found 'many'"),
        (["--device", "tpu"], "--device"),
        ([], "--tasks"),
    ],
)
def test_options_that_mean_nothing(tmp_path, words, message):
    tasks = ["--tasks", "x"] if words else []
    with pytest.raises(UserError, match=message):
        main(["--checkpoint", "x", *tasks, *words, "--out", str(tmp_path / "out")])


def test_the_table_of_what_the_harness_returns(tmp_path):
    """In the form of version 0.4.13: a filter of the answers, an error that is none, a task that is not there."""
    metrics = {"alias": "sums", "sample_len": 5, "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.125}
    metrics |= {"perplexity,none": 12.3456, "perplexity_stderr,none": "N/A"}
    first = {
        "results": {"sums": metrics},
        "n-shot": {"sums": 4},
        "n-samples": {"sums": {"original": 9, "effective": 5}},
        "higher_is_better": {"sums": {"exact_match": True}},
        "config": {"model_num_parameters": 1_234_000, "limit": 5},
        "lm_eval_version": "0.4.13",
    }
    table = write_table({"a|b": first, "c": {"results": {}, "config": {}}}, tmp_path)
    assert table.splitlines()[2:7] == [
        "| task | metric | shots | examples | a\\|b | c |",
        "| --- | --- | --- | --- | --- | --- |",
        "| parameters, M |  |  |  | 1.2 | - |",
        "| sums | exact_match (strict, higher is better) | 4 | 5 | 0.5 +- 0.12 | - |",
        "| sums | perplexity | 4 | 5 | 12.35 | - |",
    ]
    assert "Only the first 5 examples" in table and json.loads((tmp_path / "lm_eval.json").read_text())["a|b"] == first
