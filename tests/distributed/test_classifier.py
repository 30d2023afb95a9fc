"""A cross-encoder through the launcher's own script: pairs, events, resume, scores, and the exported folder."""

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import launched_run
from support.launched_run import StageRuns
from support.small import small_model
from support.tiny_decoder import write_text
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from homodistil.config.command_line import parse
from homodistil.config.schema import RunConfig
from homodistil.errors import UserError
from homodistil.evaluation.scores import compared_scores
from homodistil.training.teacher_checks import check_teacher

STUDENT = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
STAGES = (2, 3)
NAMES = {0: "contradiction", 1: "entailment", 2: "neutral"}
PAIRS = [("the cat sees a dog", "a dog"), ("the house", "the house sees the old cat. a bird sings and sings")]


def arguments(materials: Path, run_dir: Path, stage: int, *overrides: str) -> list[str]:
    command = launched_run.arguments(materials, run_dir, stage, STUDENT, *overrides)
    command = [argument for argument in command if not argument.startswith("loss.kl=")]
    return [*command, "pruning.compensation_sequences=48"]


def write_teacher(folder: Path, words: list[str], kind: type = BertForSequenceClassification, **labels: object) -> None:
    """A BERT with a head of random weights that are large enough for different labels, and its tokenizer."""
    folder.parent.mkdir(exist_ok=True)
    vocabulary = folder.parent / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", *words]))
    config = small_model(max_position_embeddings=40).config
    for name, value in labels.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = kind(config)
    torch.nn.init.normal_(model.classifier.weight, std=2.0)
    model.save_pretrained(folder)
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(folder)


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """`teacher` of three labels, `reranker` of one, and `text/pairs.jsonl`: a sentence beside others."""
    folder, draw = tmp_path_factory.mktemp("classifier"), random.Random(0)
    documents = [path.read_text() for path in sorted(write_text(folder / "documents").glob("*.txt"))]
    sentences = [sentence for document in documents for sentence in document.split(". ")]
    words = sorted({word.strip(".") for document in documents for word in document.split()})
    write_teacher(folder / "teacher", words, id2label=NAMES, label2id={name: i for i, name in NAMES.items()})
    write_teacher(folder / "reranker", words, num_labels=1)
    (folder / "text").mkdir()
    pairs = [(draw.choice(sentences), " ".join(draw.choices(sentences, k=draw.randint(1, 5)))) for _ in range(300)]
    lines = [json.dumps({"id": i, "query": a, "passage": b}) for i, (a, b) in enumerate(pairs)]
    (folder / "text" / "pairs.jsonl").write_text("\n".join(lines))
    return folder


LAYERS = ("hidden", "attention", "embedding")
PAIR_FIELDS = ("data.pair_columns=[query,passage]", "data.heldout_fraction=0.2")


@pytest.fixture(scope="module")
def runs(server, materials) -> StageRuns:
    def run_stage(stage: int) -> Path:
        report = f"run.report={stage == 2}".lower()
        command = arguments(materials, materials / f"run{stage}", stage, *PAIR_FIELDS, report)
        (materials / f"zero{stage}.txt").write_text(launched_run.run(server, command))
        return materials / f"run{stage}"

    return StageRuns(run_stage)


def heldout_logits(folder: Path, blocks: Path) -> torch.Tensor:
    """Of the held-out pairs, by the stock class alone."""
    ids = torch.from_numpy(np.load(blocks).astype(np.int64))
    types = ((ids == 3).cumsum(1) - (ids == 3).long() > 0) & (ids != 0)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(ids, attention_mask=(ids != 0).long(), token_type_ids=types.long()).logits


def test_the_teacher_makes_it_a_classifier(runs):
    output = (runs[2].parent / "zero2.txt").read_text()
    assert "scores; logits of pairs (query, passage) of at most 32 tokens (longest_first)" in output
    assert "rotation at full width: KL of labels" in output and "compensation full" in output
    assert "scores_kl x 4" in output and "same label" in output and "KL to teacher" in output
    assert "MLM loss" not in output and "cosine" not in output
    teacher, student = json.loads((runs[2] / "result.json").read_text())
    assert (teacher["kl_to_teacher"], teacher["label_agreement"]) == (0, 1)
    page = (runs[2] / "report.html").read_text()
    assert "same label" in page and "head of labels" in page
    assert 0 < student["kl_to_teacher"] < 1 and 0.5 < student["label_agreement"] <= 1


@pytest.mark.parametrize("stage", STAGES)
def test_the_student_shrinks_and_comes_back(runs, stage):
    events = launched_run.lines(runs[stage] / "events.jsonl")
    assert len(events) >= 3 and events[-1]["widths_after"]["hidden"] == events[-1]["widths_after"]["classifier"] == 16
    assert all(event["gap_after"]["scores_kl"] > 0 for event in events)
    losses = [line for line in launched_run.lines(runs[stage] / "metrics.jsonl") if "loss/total" in line]
    assert abs(losses[0]["loss/scores_kl"]) < 1e-6 and losses[-1]["loss/scores_kl"] > 0


def test_resume_is_bitwise(server, runs, materials, tmp_path):
    copy = launched_run.without_end(runs[2], tmp_path / "run")
    launched_run.run(server, arguments(materials, copy, 2, *PAIR_FIELDS, "run.resume=auto"))
    assert launched_run.same_export(copy, runs[2])


@pytest.mark.parametrize("stage", STAGES)
def test_the_export_is_what_was_measured(runs, materials, stage):
    (blocks,) = materials.glob("cache/corpora/*/heldout.npy")
    ours, theirs = (heldout_logits(folder, blocks) for folder in (runs[stage] / "export", materials / "teacher"))
    row, measured = (
        json.loads((runs[stage] / "result.json").read_text())[1],
        compared_scores(ours, theirs, "categories"),
    )
    assert measured["kl_to_teacher"] == pytest.approx(row["kl_to_teacher"], abs=1e-5)
    assert measured["label_agreement"] == pytest.approx(row["label_agreement"], abs=0.02)  # near ties may turn


def test_the_export_has_the_teachers_labels(runs):
    export = runs[2] / "export"
    config = json.loads((export / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"] and config["hidden_size"] == 16
    assert config["id2label"] == {str(i): name for i, name in NAMES.items()}
    assert config["label2id"] == {name: i for i, name in NAMES.items()}
    card = (export / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "AutoModelForSequenceClassification.from_pretrained" in card
    assert "texts with the teacher's label" in card and "MLM" not in card and "no pooler" not in card


def settled(folder: Path, *fields: str) -> RunConfig:
    sizes = [f"student.{name}={size}" for name, size in STUDENT.items()]
    config = parse([f"teacher.name={folder}", *sizes, "data.seq_len=32", *fields])
    check_teacher(config)
    return config


def test_what_a_run_gives_a_classifier_and_what_it_leaves(materials):
    config = settled(materials / "teacher")
    assert (config.data.task, config.data.prompt, config.pruning.compensation) == ("scores", "none", "full")
    assert (config.loss.scores_kl, config.loss.scores_mse, config.pruning.compensation_sequences) == (4, 0, 512)
    config = settled(materials / "reranker", "data.texts=document")
    assert (config.loss.scores_kl, config.loss.scores_mse, config.loss.kl) == (0, 1, 0)
    config = settled(materials / "teacher", "loss.scores_mse=3", "pruning.compensation_sequences=7")
    assert (config.loss.scores_kl, config.loss.scores_mse, config.pruning.compensation_sequences) == (0, 3, 7)
    config = settled(materials / "teacher", "data.task=none")
    assert (config.loss.scores_kl, config.loss.scores_mse, config.pruning.compensation) == (0, 0, "refit")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (("loss.kl=1", "data.task=scores"), "loss.kl: found 1, but data.task=scores uses no language-modelling head"),
        (("loss.kl=1",), "has no MLM head"),
        (("loss.scores_mse=1", "data.task=mlm"), "loss.scores_mse: found 1.0, but data.task=mlm has no head of labels"),
        (
            ("data.pair_columns=[a,b]", "data.task=none"),
            "data.pair_columns: found ['a', 'b'], but data.task=none has",
        ),
        (("data.pair_columns=[a]",), "data.pair_columns: found ['a'], allowed are the names of two columns"),
        (("data.pair_columns=[a,a]",), "data.pair_columns: found ['a', 'a'], allowed are the names of two columns"),
        (
            ("data.pair_columns=[a,b]", "data.prompt=x"),
            "data.prompt: found 'x', allowed with data.pair_columns is",
        ),
        (("loss.scores_kl=0", "loss.scores_mse=0"), "loss.scores_kl: found 0, and loss.scores_mse is 0 as well"),
        (("data.task=scores", "pruning.importance=activation"), "pruning.importance: found activation, which does not"),
        (("data.task=scores", "pruning.importance=teacher_kl"), "pruning.importance: found teacher_kl, which draws"),
        (("teacher=reranker", "loss.scores_kl=1"), "loss.scores_kl: found 1, but the 1 label(s) of"),
        (("teacher=no_head",), "the weights lack 1 tensor that config.json asks for (classifier.weight)"),
        (("teacher=wide_head",), "classifier.bias is 3 in the weights, 5 by config.json (and 1 more)"),
        (("teacher=gap",), "has id2label with the numbers [0, 2, 3], expected 0 .. 2 without gaps"),
        (("teacher=masked", "data.task=scores"), "has no head of labels that data.task=scores could learn from (found"),
        (("teacher=decoder",), "is a decoder with a head of labels (LlamaForSequenceClassification), supported are"),
        (("teacher=quantised",), "found quantization_config: quantised weights cannot be trained or cut"),
    ],
    ids=str,
)
def test_bad_input_is_told_in_one_line(materials, fields, said):
    name = fields[0].removeprefix("teacher=") if fields[0].startswith("teacher=") else "teacher"
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        settled(broken(materials, name), *(field for field in fields if not field.startswith("teacher=")))
    assert "\n" not in str(caught.value)


def broken(materials: Path, name: str) -> Path:
    """A folder whose files do not fit, made of `teacher`'s."""
    folder = materials / name
    if folder.exists():
        return folder
    if name in ("masked", "decoder"):
        sizes = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
        kind = (LlamaConfig, LlamaForSequenceClassification) if name == "decoder" else (BertConfig, BertForMaskedLM)
        kind[1](kind[0](**sizes, intermediate_size=40)).save_pretrained(folder)
        return folder
    shutil.copytree(materials / "teacher", folder)
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    if name == "no_head":
        save_file({n: w for n, w in weights.items() if n != "classifier.weight"}, folder / "model.safetensors")
    changes = {
        "wide_head": {"id2label": {i: str(i) for i in range(5)}, "label2id": {str(i): i for i in range(5)}},
        "gap": {"id2label": {0: "a", 2: "b", 3: "c"}, "label2id": {"a": 0, "b": 2, "c": 3}},
        "quantised": {"quantization_config": {"quant_method": "bitsandbytes"}},
    }
    (folder / "config.json").write_text(json.dumps(config | changes.get(name, {})))
    return folder


def test_a_reranker_of_single_texts(server, materials):
    """One label: squared distances and correlations; sentences of another folder, one per block. Its teacher has been
    saved by sentence-transformers, with scores as they are: so are the student's."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    identity, folder = torch.nn.Identity(), materials / "cross_encoder"
    teacher = sentence_transformers.CrossEncoder(str(materials / "reranker"), activation_fn=identity, device="cpu")
    teacher.save_pretrained(str(folder), create_model_card=False)
    (materials / "texts").mkdir()
    (materials / "documents").rename(materials / "texts" / "documents")
    run_dir = materials / "scores"
    fields = (f"teacher.name={folder}", f"data.sources=[{materials / 'texts'}]", "data.texts=sentence")
    output = launched_run.run(server, arguments(materials, run_dir, 2, *fields, "pruning.compensation=refit"))
    assert "logits of single texts (sentence)" in output and "scores_mse x 1" in output and "KL" not in output
    row = json.loads((run_dir / "result.json").read_text())[1]
    assert row["score_mse"] > 0 and -1 <= row["score_spearman"] <= 1 and "label_agreement" not in row
    student = sentence_transformers.CrossEncoder(str(run_dir / "export"), device="cpu")
    model = AutoModelForSequenceClassification.from_pretrained(run_dir / "export").eval()
    tokenizer = BertTokenizerFast.from_pretrained(run_dir / "export")
    tokens = tokenizer(*zip(*PAIRS, strict=True), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens).logits.squeeze(1).numpy()
    np.testing.assert_allclose(student.predict(PAIRS), logits, rtol=1e-4, atol=1e-5)


def test_scores_from_stored_outputs_are_bitwise_those_of_a_running_reranker(server, materials):
    """Micro-batches of three pairs: products of so few rows have last bits of their own."""
    folders = []
    for outputs in ("live", "stored"):
        folders.append(materials / outputs)
        fields = (f"teacher.name={materials / 'reranker'}", f"teacher.outputs={outputs}", *PAIR_FIELDS)
        sizes = ("train.global_batch_size=6", "train.micro_batch_size=3", *(f"loss.{name}=0" for name in LAYERS))
        launched_run.run(server, arguments(materials, folders[-1], 2, *fields, *sizes))
    assert launched_run.same_export(*folders)
    rows = [json.loads((folder / "result.json").read_text())[1] for folder in folders]
    scores = [{name: value for name, value in row.items() if "tokens_per_s" not in name} for row in rows]
    assert scores[0] == scores[1] and scores[0]["score_mse"] > 0
