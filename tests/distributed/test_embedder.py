"""A sentence embedder through the launcher's own script: its task, events, resume, scores, and the exported folder."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support import launched_run
from support.launched_run import StageRuns
from support.small import small_model
from support.tiny_decoder import write_text
from transformers import AutoModel, BertModel, BertTokenizerFast

from homodistil.config.command_line import parse
from homodistil.config.schema import RunConfig
from homodistil.errors import UserError
from homodistil.evaluation.probe.features import SentenceFeatures
from homodistil.evaluation.vectors import recall
from homodistil.models.sentence_head import load_sentence_head
from homodistil.models.sentence_modules import read_sentence_modules
from homodistil.training.teacher_checks import check_teacher

sentence_transformers = pytest.importorskip("sentence_transformers")
STUDENT = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
STAGES = (2, 3)
TEXTS = ["the cat sees a dog", "a dog", "the house sees the old cat. a bird sings"]


def arguments(materials: Path, run_dir: Path, stage: int, *overrides: str) -> list[str]:
    command = launched_run.arguments(materials, run_dir, stage, STUDENT, *overrides)
    command = [argument for argument in command if not argument.startswith("loss.kl=")]
    return [*command, "data.texts=sentence", "pruning.compensation_sequences=48"]


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """`teacher`, as sentence-transformers saves it: cls pooling, a Dense, Normalize, a default prompt; and `text`."""
    from sentence_transformers.base.modules.dense import Dense
    from sentence_transformers.base.modules.normalize import Normalize
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.modules.pooling import Pooling

    folder = tmp_path_factory.mktemp("embedder")
    text = write_text(folder / "text")
    words = sorted({word.strip(".") for path in text.glob("*.txt") for word in path.read_text().split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", *words]))
    model = small_model(max_position_embeddings=40)
    encoder = BertModel(model.config)
    encoder.load_state_dict(model.bert.state_dict(), strict=False)
    encoder.save_pretrained(folder / "plain")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "plain")
    torch.manual_seed(0)
    modules = [Transformer(str(folder / "plain")), Pooling(24, "cls"), Dense(24, 9), Normalize()]
    options = {"prompts": {"of a cat": f"the {words[0]} "}, "default_prompt_name": "of a cat", "device": "cpu"}
    embedder = sentence_transformers.SentenceTransformer(modules=modules, **options)
    embedder.save(str(folder / "teacher"), create_model_card=False)
    return folder


@pytest.fixture(scope="module")
def runs(server, materials) -> StageRuns:
    def run_stage(stage: int) -> Path:
        folder, report = materials / f"run{stage}", f"run.report={stage == 2}".lower()
        output = launched_run.run(server, arguments(materials, folder, stage, report))
        (materials / f"zero{stage}.txt").write_text(output)
        return folder

    return StageRuns(run_stage)


def test_the_teacher_makes_it_an_embedder(runs, materials):
    teacher, student = json.loads((runs[2] / "result.json").read_text())
    output = (materials / "zero2.txt").read_text()
    assert "task embedding" in output and "embedding; vectors of single texts (sentence)" in output
    assert "rotation at full width: 1 - cosine of vectors" in output and "compensation full" in output
    assert "each behind 'the " in output and "pooled_cosine x 10" in output
    assert "cosine to teacher" in output and "recall@10" in output and "KL" not in output and "MLM" not in output
    assert teacher["cosine_to_teacher"] == teacher["recall_at_10"] == 1
    assert 0 < student["cosine_to_teacher"] < 1 and 0 < student["recall_at_10"] <= 1
    assert "cosine to teacher" in (runs[2] / "report.html").read_text()


@pytest.mark.parametrize("stage", STAGES)
def test_the_student_shrinks_and_comes_back(runs, stage):
    events = launched_run.lines(runs[stage] / "events.jsonl")
    assert len(events) >= 3 and events[-1]["widths_after"]["hidden"] == 16
    assert all(event["gap_after"]["pooled_cosine"] > 0 for event in events)
    losses = [line for line in launched_run.lines(runs[stage] / "metrics.jsonl") if "loss/total" in line]
    assert abs(losses[0]["loss/pooled_cosine"]) < 1e-6 and losses[-1]["loss/pooled_cosine"] > 0


@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bitwise(server, runs, materials, tmp_path, stage):
    copy = launched_run.without_end(runs[stage], tmp_path / "run")
    launched_run.run(server, arguments(materials, copy, stage, "run.resume=auto"))
    assert launched_run.same_export(copy, runs[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_the_export_is_what_was_measured(runs, materials, stage):
    """Vectors of the held-out texts by sentence-transformers alone, from both folders."""
    export = runs[stage] / "export"
    (blocks,) = materials.glob("cache/corpora/*/heldout.npy")
    ids = torch.from_numpy(np.load(blocks).astype(np.int64))
    features = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    vectors = []
    for folder in (export, materials / "teacher"):
        model = sentence_transformers.SentenceTransformer(str(folder), device="cpu").eval()
        with torch.no_grad():
            vectors.append(model(dict(features))["sentence_embedding"])
    row = json.loads((runs[stage] / "result.json").read_text())[1]
    cosine = torch.nn.functional.cosine_similarity(*vectors, dim=-1).mean().item()
    assert cosine == pytest.approx(row["cosine_to_teacher"], abs=1e-5)
    assert recall(*vectors) == pytest.approx(row["recall_at_10"], abs=1e-2)  # near ties may turn


def test_the_export_is_a_folder_of_sentence_transformers(runs, materials):
    export = runs[2] / "export"
    model = sentence_transformers.SentenceTransformer(str(export), device="cpu")
    kinds = [type(module).__name__ for module in model]
    assert kinds == ["Transformer", "Pooling", "Dense", "Dense", "Normalize"]
    assert model[2].linear.weight.shape == (24, 16) and model[3].linear.weight.shape == (9, 24)
    teacher = sentence_transformers.SentenceTransformer(str(materials / "teacher"), device="cpu")
    assert model.prompts == teacher.prompts and model.default_prompt_name == "of a cat"
    assert model.max_seq_length == teacher.max_seq_length
    theirs = model.encode(TEXTS, prompt="", convert_to_tensor=True)
    stock, tokenizer = AutoModel.from_pretrained(export).eval(), BertTokenizerFast.from_pretrained(export)
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = stock(**tokens).last_hidden_state
        head = load_sentence_head(read_sentence_modules(str(export), "auto", "teacher.name"), "teacher.name")
        torch.testing.assert_close(head(states, tokens["attention_mask"]), theirs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(SentenceFeatures(str(export)).encode(TEXTS), model.encode(TEXTS), rtol=1e-5, atol=1e-5)
    card = (export / "README.md").read_text()
    assert "sentence-similarity" in card and "SentenceTransformer(" in card and "recall@10" in card


def test_the_recipe_suits_an_encoder_without_modules(materials):
    sizes = [f"student.{name}={size}" for name, size in STUDENT.items()]
    config = parse(["recipe=quickstart-embedder", f"teacher.name={materials / 'plain'}", *sizes])
    check_teacher(config)
    assert (config.data.task, config.data.prompt, config.loss.kl) == ("embedding", "none", 0)
    assert config.loss.weights == {"hidden": 1, "pooled_cosine": 10}
    assert not (config.leaves_open("data.seq_len") or config.leaves_open("loss.hidden"))


def test_what_a_run_gives_an_embedder_and_what_it_leaves(materials):
    """Weight and calibration of its own, unless they are set; nothing where words are wanted, or no vectors."""
    sizes = [f"student.{name}={size}" for name, size in STUDENT.items()]

    def settled(*fields: str) -> RunConfig:
        config = parse([f"teacher.name={materials / 'teacher'}", *sizes, "data.seq_len=32", *fields])
        check_teacher(config)
        return config

    config = settled()
    assert config.data.task == "embedding" and config.pruning.compensation == "full"
    assert (config.loss.pooled_cosine, config.pruning.compensation_sequences) == (10, 512)
    config = settled("loss.pooled_mse=3", "pruning.compensation_sequences=7", "pruning.basis=fisher")
    assert (config.loss.pooled_cosine, config.loss.pooled_mse, config.pruning.compensation_sequences) == (0, 3, 7)
    config = settled("data.task=none")
    assert (config.loss.pooled_cosine, config.pruning.compensation) == (0, "refit")
    for fields, said in (
        (["data.task=none", "loss.pooled_mse=1"], "loss.pooled_mse: found 1, allowed with data.task=none is 0"),
        (["data.task=embedding", "loss.kl=1"], "loss.kl: found 1, but data.task=embedding uses no"),
        (["loss.mlm=1"], "has no MLM head"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            settled(*fields)


def test_vectors_of_their_own_dims(server, materials):
    """Similarities alone leave the student's vectors as wide as its states: no Dense, no cosine to the teacher's."""
    run_dir, fields = materials / "own", ("loss.pooled_similarity=1", "data.pooling=mean", "data.prompt=none")
    output = launched_run.run(server, arguments(materials, run_dir, 2, *fields))
    model = sentence_transformers.SentenceTransformer(str(run_dir / "export"), device="cpu")
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
    assert model.encode(TEXTS).shape == (3, 16) and model[1].pooling_mode == "mean"
    row = json.loads((run_dir / "result.json").read_text())[1]
    assert "cosine_to_teacher" not in row and row["recall_at_10"] > 0 and "each behind" not in output


def test_fewer_pieces(server, materials):
    """The smaller teacher is an embedder, and so is what comes out, with the tokenizer that it learned by."""
    run_dir = materials / "pieces"
    output = launched_run.run(server, arguments(materials, run_dir, 2, "student.vocab=16"))
    assert "-> 16 pieces" in output and "task: embedding" in output
    model = sentence_transformers.SentenceTransformer(str(run_dir / "export"), device="cpu")
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Dense", "Dense", "Normalize"]
    assert len(model.tokenizer) == model[0].auto_model.config.vocab_size == 16
    assert model.prompts and model.encode(TEXTS).shape == (3, 9)
    teacher, student = json.loads((run_dir / "result.json").read_text())
    assert teacher["cosine_to_teacher"] == 1 > student["cosine_to_teacher"] > 0
    assert teacher["parameters_before"] - teacher["parameters"] == (teacher["pieces_before"] - 16) * 24
