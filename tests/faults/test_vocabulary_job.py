"""A job whose teacher loses pieces of its vocabulary first: bitwise resume, the cache of such teachers, the export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.small import small_model
from support.small_job import TRAIN, VOCABULARY, arguments, differences, make_materials, result
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertTokenizerFast

from homodistil.distributed.exit_codes import USER_ERROR
from homodistil.training.run_members import members_of

USED = [
    "the",
    "quick",
    "brown",
    "fox",
    "jump",
    "##s",
    "over",
    "lazy",
    "dog",
    "and",
    "five",
    "box",
    "##ing",
    "pack",
    "my",
]
UNUSED = ["zebra", "##ness", "winter", "##ly", "umbrella"]
PIECES = [*VOCABULARY, *(piece for piece in (*UNUSED, *USED) if piece not in VOCABULARY)]
SIZE = 64
OVERRIDES = (f"student.vocab={SIZE}", "pruning.compensation=refit", "pruning.compensation_sequences=16")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """As `run_inputs`, with whole words in the vocabulary, some of which no text has."""
    folder = tmp_path_factory.mktemp("vocabulary")
    make_materials(folder, vocab_size=len(PIECES))
    (folder / "vocab.txt").write_text("\n".join(PIECES))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "teacher")
    return folder


def run(server, command: list[str], codes=(0, 0), env=None, num_ranks: int = 2) -> str:
    job = server.start(TRAIN, command, env=env, num_ranks=num_ranks)
    assert sorted(job.wait(timeout_s=180)) == sorted(codes), job.output()
    assert "Traceback" not in job.output(), job.output()
    return job.output()


@pytest.fixture(scope="module")
def finished(server, inputs) -> tuple[Path, str]:
    """Run folder of the job that nothing happened to, and what it printed."""
    folder = inputs / "finished"
    return folder, run(server, arguments(inputs, folder, *OVERRIDES))


@pytest.fixture(scope="module")
def killed(server, inputs, finished) -> Path:
    """A copy of the inputs with a job that was killed twice: while it made the teacher, and behind its second
    checkpoint."""
    folder = inputs.with_name("killed")
    shutil.copytree(inputs, folder, ignore=shutil.ignore_patterns("finished", "cache"))
    command = arguments(folder, folder / "run", *OVERRIDES)
    job = server.start(TRAIN, command, env={"HOMODISTIL_FAULT": "vocabulary.written"})
    assert -9 in job.wait(timeout_s=180), job.output()
    assert list((folder / "cache" / "teachers").glob("[!.]*")) == [] and not (folder / "run").exists()
    run(server, command, (-9, -9), {"HOMODISTIL_FAULT": "train.step:hit=8"})
    return folder


def smaller_teacher(inputs: Path) -> Path:
    (path,) = (inputs / "cache" / "teachers").glob("[!.]*/vocabulary.json")
    return path.parent


def test_what_is_said_and_measured(inputs, finished):
    folder, output = finished
    assert f"vocabulary: {len(PIECES)} -> {SIZE} pieces" in output
    teacher, student = json.loads((folder / "result.json").read_text())
    whole = sum(parameter.numel() for parameter in small_model(vocab_size=len(PIECES)).parameters())
    cut = (len(PIECES) - SIZE) * (24 + 1)
    whole -= 16 * 24 - 32 * 24  # the job's teacher has 32 positions
    assert teacher["name"] == f"teacher, {SIZE} of {len(PIECES)} pieces (whole: {whole:,} parameters)"
    assert (teacher["parameters"], teacher["parameters_before"]) == (whole - cut, whole)
    assert student["kl_to_teacher"] > 0
    # What `homodistil latency` times: the teacher of this row, and the export.
    timed = [(Path(member.checkpoint), member.label) for member in members_of(folder)]
    assert timed == [(smaller_teacher(inputs), teacher["name"]), (folder / "export", "homodistil")]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert len(events) == 4
    # Until the first event the student is a copy of the smaller teacher.
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["gap/hidden"] == first["gap/kl"] == 0


def test_the_smaller_teacher_is_rows_of_the_whole_one(inputs, finished):
    folder = smaller_teacher(inputs)
    before, after = (load_file(path / "model.safetensors") for path in (inputs / "teacher", folder))
    old, new = (AutoTokenizer.from_pretrained(path).get_vocab() for path in (inputs / "teacher", folder))
    kept = [old[piece] for piece in sorted(new, key=new.get)]
    assert set(UNUSED) & old.keys() and not set(UNUSED) & new.keys()
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        of_rows = before[name].shape[0] == len(PIECES)
        assert torch.equal(tensor, before[name][kept] if of_rows else before[name]), name
    stock = AutoModelForMaskedLM.from_pretrained(folder)
    whole = AutoModelForMaskedLM.from_pretrained(inputs / "teacher")
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("the quick brown dog").input_ids])
    with torch.no_grad():
        expected = whole(torch.tensor(kept)[ids]).logits[..., kept]
        torch.testing.assert_close(stock(ids).logits, expected, rtol=1e-6, atol=1e-6)


def test_the_export_is_a_stock_model_with_its_tokenizer(inputs, finished):
    export = finished[0] / "export"
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().weight.shape[0] == SIZE
    assert model.config.pad_token_id == tokenizer.pad_token_id
    whole, text = AutoTokenizer.from_pretrained(inputs / "teacher"), (inputs / "text" / "0.txt").read_text()
    words, same = sorted(set(text.split())), 0
    for word in words:
        before, now = whole.tokenize(word), tokenizer.tokenize(word)
        same += before == now
        assert (before == now) == (set(before) <= tokenizer.get_vocab().keys()) and "[UNK]" not in now
    assert 3 < same < len(words)
    assert tokenizer.decode(tokenizer("a zebra").input_ids, skip_special_tokens=True) == "a zebra"
    card = (export / "README.md").read_text()
    assert f"| vocabulary | {len(PIECES)} -> {SIZE} pieces" in card


def test_a_run_that_was_killed_twice_ends_bitwise_the_same(server, killed, finished, tmp_path):
    shutil.copytree(killed, tmp_path / "it")
    output = run(server, arguments(tmp_path / "it", tmp_path / "it" / "run", "run.resume=auto", *OVERRIDES))
    assert "resumed from step 6" in output
    assert differences(result(tmp_path / "it" / "run"), result(finished[0])) == []


def test_a_run_goes_on_with_another_number_of_ranks(server, killed, finished, tmp_path):
    shutil.copytree(killed, tmp_path / "it")
    command = arguments(tmp_path / "it", tmp_path / "it" / "run", "run.resume=auto", *OVERRIDES)
    output = run(server, command, (0,), num_ranks=1)
    assert "resumed from step 6" in output
    ours, theirs = (load_file(path / "export" / "model.safetensors") for path in (tmp_path / "it" / "run", finished[0]))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "vocabulary.json", "checksums.json"])
def test_a_damaged_teacher_is_made_again(server, killed, finished, tmp_path, name):
    shutil.copytree(killed, tmp_path / "it")
    path = smaller_teacher(tmp_path / "it") / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    output = run(server, arguments(tmp_path / "it", tmp_path / "it" / "run", "run.resume=auto", *OVERRIDES))
    (warning,) = [line for line in output.splitlines() if "warning: " in line]
    assert "is damaged (" in warning and warning.endswith("made again"), output
    assert differences(result(tmp_path / "it" / "run"), result(finished[0])) == []


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("student.vocab=60",), f"has {SIZE}, this config 60; go on with the same value"),
        ((f"student.vocab={SIZE}", "change"), "data.sources: is not what the run in"),
    ],
    ids=["size", "text"],
)
def test_another_vocabulary_is_refused_on_resume(server, killed, tmp_path, overrides, says):
    shutil.copytree(killed, tmp_path / "it")
    if "change" in overrides:
        (tmp_path / "it" / "text" / "3.txt").write_text("my dog and the fox " * 40)
    command = arguments(tmp_path / "it", tmp_path / "it" / "run", "run.resume=auto", *OVERRIDES, overrides[0])
    before = {path: path.read_bytes() for path in (tmp_path / "it" / "run").rglob("*") if path.is_file()}
    output = run(server, command, (USER_ERROR, USER_ERROR))
    (error,) = [line for line in output.splitlines() if "error: " in line]
    assert says in error, error
    assert {path: path.read_bytes() for path in (tmp_path / "it" / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("vocab", "says"),
    [
        ("20", "student.vocab: found 20, allowed for this teacher and text are 5"),
        ("5000", f"student.vocab: found 5000, the teacher has {len(PIECES)} pieces"),
        ("many", "student.vocab: found 'many', allowed are all, corpus and a number"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_refused(server, inputs, tmp_path, vocab, says):
    job = server.start(TRAIN, arguments(inputs, tmp_path / "run", f"student.vocab={vocab}"), num_ranks=1)
    assert job.wait(timeout_s=180) == [USER_ERROR], job.output()
    (error,) = [line for line in job.output().splitlines() if "error: " in line]
    assert says in error and not (tmp_path / "run").exists(), error
