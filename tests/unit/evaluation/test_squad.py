"""SQuAD on small files of the real layout: reading, windows, learning, resuming, errors."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families.cases import write_export
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from homodistil.errors import UserError
from homodistil.evaluation.glue.grid import Grid
from homodistil.evaluation.squad.answers import answers
from homodistil.evaluation.squad.examples import Answer, Example, SquadData, load_squad, read_examples
from homodistil.evaluation.squad.features import Windows, windows
from homodistil.evaluation.squad.fine_tuning import Settings, fine_tune
from homodistil.evaluation.squad.grid import run_grid, summarise, write_table
from homodistil.evaluation.squad.metrics import score

LAUNCHER = Path(__file__).parents[3] / "launcher" / "squad.py"
PLACES = ("Paris", "Lima", "Oslo", "Cairo", "Quito", "Delhi", "Rome", "Accra")
PEOPLE = ("Ada", "Bo", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal")
WORDS = "where when does live in who lives . , ? the old town of since a long time near river and".split()


def context_of(i: int) -> str:
    return f"{PEOPLE[i]} lives in the old town of {PLACES[i]}, near a river."


def answerable(i: int, ident: str | None = None) -> dict:
    text, context = f"old town of {PLACES[i]}", context_of(i)
    answer = {"text": text, "answer_start": context.index(text)}
    return {"id": ident or f"q{i}", "question": f" Where does {PEOPLE[i]} live?", "answers": [answer]}


def impossible(i: int) -> dict:
    plausible = [{"text": PLACES[i], "answer_start": context_of(i).index(PLACES[i])}]
    question = f"Since when does {PEOPLE[i]} live?"
    return {"id": f"n{i}", "question": question, "answers": [], "plausible_answers": plausible, "is_impossible": True}


def file_content(version: str) -> dict:
    paragraphs = []
    for i in range(8):
        questions = [answerable(i)]
        if version == "v2.0":
            questions = [questions[0] | {"is_impossible": False}, impossible(i)]
        paragraphs.append({"context": context_of(i), "qas": questions})
    return {"version": version.removeprefix("v1.1") or "1.1", "data": [{"title": "Towns", "paragraphs": paragraphs}]}


def write_files(folder: Path, *versions: str) -> Path:
    for version in versions:
        for split in ("train", "dev"):
            (folder / f"{split}-{version}.json").write_text(json.dumps(file_content(version)))
    return folder


def word_level_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(w.lower() for w in (*PLACES, *PEOPLE, *WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny random BERT with a word-level fast tokenizer of its own."""
    folder, tokenizer = tmp_path_factory.mktemp("checkpoint"), word_level_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def words(checkpoint) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(checkpoint)


# --- windows and answers ----------------------------------------------------------------------------------------------


def test_windows_cover_the_context_with_the_stride_and_know_their_characters(words):
    context = " ".join(f"{WORDS[i % 7]} {PLACES[i % 8]}." for i in range(70))  # 210 tokens
    start = context.index("Oslo", 400)
    example = Example("x", "Who lives?", context, (Answer("Oslo", start),))
    found = windows([example, example], words, max_length=90, stride=11, labelled=True)
    assert found.owners == sorted(found.owners) and found.owners.count(0) == found.owners.count(1) > 2

    seen, holding = [], 0
    for inputs, spans in list(zip(found.inputs, found.spans, strict=True))[: found.owners.count(0)]:
        ids = inputs["input_ids"]
        assert len(ids) == len(spans) <= 90 and ids[0] == words.cls_token_id
        assert spans[:5] == [None] * 5 and spans[-1] is None  # [CLS] who lives ? [SEP] ... [SEP]
        inside = [span for span in spans if span]
        for token, span in zip(ids, spans, strict=True):
            if span:
                assert words.convert_ids_to_tokens(token) in (context[span[0] : span[1]].lower(), "[UNK]")
        if seen:
            assert seen[-11:] == inside[:11]
        seen += inside[11:] if seen else inside
        position = (inputs["start_positions"], inputs["end_positions"])
        if (start, start + 4) in inside:
            holding += 1
            assert [spans[i] for i in position] == [(start, start + 4)] * 2
        else:
            assert position == (0, 0)
    assert len(seen) == 210 and holding >= 1  # everything once, in order
    assert [context[a:b] for a, b in seen] == [word for pair in context.split() for word in _split_dot(pair)]


def _split_dot(word: str) -> list[str]:
    return [word[:-1], "."] if word.endswith(".") and len(word) > 1 else [word]


def test_a_window_with_half_the_answer_points_at_no_answer(words):
    context = " ".join(["old"] * 200)
    long_answer = Example("x", "Who?", context, (Answer(context[: 4 * 150].strip(), 0),))  # longer than a window
    found = windows([long_answer], words, max_length=80, stride=4, labelled=True)
    assert len(found.inputs) > 2 and all(x["start_positions"] == x["end_positions"] == 0 for x in found.inputs)


def test_long_questions_are_cut_and_their_context_stays(words):
    example = Example("x", "who " * 500, context_of(0), (Answer("Ada", 0),))
    found = windows([example], words, max_length=100, stride=8, labelled=True)
    ids = found.inputs[0]["input_ids"]
    assert len(found.inputs) == 1 and ids.index(words.sep_token_id) == 1 + 64
    assert found.inputs[0]["start_positions"] == 66


def test_answers_are_the_best_span_over_windows():
    """Against a search over all pairs in plain Python, and by hand for the null score."""
    generator = np.random.default_rng(0)
    context = "".join(chr(97 + i % 26) for i in range(40))
    example = Example("x", "?", context, ())
    spans = [
        [None, None, *((i, i + 1) for i in range(13)), None],
        [None, None, *((i, i + 1) for i in range(9, 20)), None],
    ]
    made = Windows([{}, {}], [0, 0], spans, [0, 0])
    for limit in (1, 3, 30):
        start, end = generator.normal(size=(2, 2, 16))
        start[0, 1] = end[1, 15] = 99.0  # outside the context: never chosen
        best = max(
            (start[w, i] + end[w, j], context[spans[w][i][0] : spans[w][j][1]])
            for w in range(2)
            for i in range(len(spans[w]))
            for j in range(i, len(spans[w]))
            if spans[w][i] and spans[w][j] and j - i < limit
        )
        null = min(start[w, 0] + end[w, 0] for w in range(2))
        assert answers([example], made, start, end, limit, None) == {"x": best[1]}
        margin = null - best[0]
        assert answers([example], made, start, end, limit, margin - 1e-6) == {"x": ""}
        assert answers([example], made, start, end, limit, margin + 1e-6) == {"x": best[1]}
    broken = np.full((2, 16), np.nan)
    assert answers([example], made, broken, broken, 30, None) == {"x": ""}


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1.1", "v2.0"])
def test_a_model_that_overfits_gets_everything_right(tmp_path, checkpoint, version):
    """Eight answers of four words (and, in v2.0, eight questions without one) learned by heart from random weights."""
    data = load_squad(write_files(tmp_path, version))
    settings = Settings(lr=2e-3, batch_size=8, epochs=30, max_length=96, stride=8, weight_decay=0.0, device="cpu")
    before, _ = fine_tune(checkpoint, data, dataclasses.replace(settings, lr=1e-9, epochs=1))
    found, predictions = fine_tune(checkpoint, data, settings)
    assert before["exact"] < 0.6
    assert (found["exact"], found["f1"]) == (1.0, 1.0)
    assert predictions["q3"] == "old town of Cairo"
    if version == "v2.0":
        assert predictions["n3"] == "" and found["no_answer_accuracy"] == found["has_answer_exact"] == 1.0


@pytest.mark.parametrize("model_type", ["distilbert", "electra", "mpnet"])
def test_other_families_are_fine_tuned(tmp_path, model_type):
    write_export(model_type, word_level_tokenizer(), tmp_path)
    data = load_squad(write_files(tmp_path, "v1.1"))
    settings = Settings(lr=1e-3, batch_size=8, epochs=1, max_length=96, stride=8, device="cpu")
    found, predictions = fine_tune(tmp_path, data, settings)
    assert found["steps"] >= 1 and set(predictions) == {f"q{i}" for i in range(8)}


def test_runs_are_kept_and_not_repeated(tmp_path, checkpoint):
    data = load_squad(write_files(tmp_path, "v1.1"))
    shared = Settings(max_length=96, stride=8, device="cpu")
    out, said = tmp_path / "out", []
    grid = Grid(lrs=[1e-3], batch_sizes=[8], epochs=[1], seeds=[0], shared=shared)
    run_grid(str(checkpoint), data, grid, out, tmp_path, said.append)
    grid = Grid(lrs=[1e-3, 1e-2], batch_sizes=[8], epochs=[1], seeds=[0, 1], shared=shared)
    records = run_grid(str(checkpoint), data, grid, out, tmp_path, said.append)
    assert len(records) == sum(": EM " in line for line in said) == 4  # the first one was there
    assert run_grid(str(checkpoint), data, grid, out, tmp_path, said.append) == records and len(said) == 8

    text = write_table(records, out)
    assert text == (out / "v1.1" / "squad.md").read_text() and text.count("| 2 |") == 2
    best = json.loads((out / "v1.1" / "squad.json").read_text())["settings"][0]
    assert best == summarise(records)[0] and best["seeds"] == [0, 1]
    values = [r["result"]["f1"] for r in records if r["setting"]["lr"] == best["lr"]]
    assert best["metrics"]["f1"]["median"] == pytest.approx(sum(values) / 2)
    assert len(json.loads((out / "v1.1" / "predictions-lr0.01-batch8-epochs1-seed1.json").read_text())) == 8

    other = Grid(lrs=[1e-3], batch_sizes=[8], epochs=[1], seeds=[0], shared=Settings(max_length=96, stride=9))
    with pytest.raises(UserError, match=r"result of another run \(differs in stride\)"):
        run_grid(str(checkpoint), data, other, out, tmp_path, said.append)
    changed = SquadData(data.version, data.train[:-1], data.dev)
    with pytest.raises(UserError, match="differs in data"):
        run_grid(str(checkpoint), changed, grid, out, tmp_path, said.append)


def launcher_arguments(folder: Path, checkpoint: Path, *more: str) -> list[str]:
    given = {"checkpoint": checkpoint, "data": folder, "out": folder / "out", "max-length": 96, "stride": 8}
    given |= {"device": "cpu", "epochs": 1}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))] + list(more)


def test_launcher(tmp_path, checkpoint, monkeypatch, capsys):
    write_files(tmp_path, "v2.0")
    monkeypatch.setattr(sys, "argv", ["squad.py", *launcher_arguments(tmp_path, checkpoint, "--seeds", "3")])
    runpy.run_path(str(LAUNCHER), run_name="__main__")
    said = capsys.readouterr().out
    assert "SQuAD v2.0: lr5e-05-batch32-epochs1-seed3: EM 0." in said and "accuracy, unanswerable" in said
    assert said.splitlines()[-1] == str(tmp_path / "out" / "v2.0" / "squad.md")


@pytest.mark.process
def test_launcher_refuses_in_one_line(server, tmp_path, checkpoint):
    write_files(tmp_path, "v1.1", "v2.0")
    job = server.start(LAUNCHER, launcher_arguments(tmp_path, checkpoint), num_ranks=1)
    assert job.wait(timeout_s=60) == [2], job.output()
    (line,) = job.output().splitlines()
    assert line.startswith("error: --data: ") and "choose one with --version" in line


# --- errors -----------------------------------------------------------------------------------------------------------


def test_versions_and_folders(tmp_path):
    with pytest.raises(UserError, match="--data: found .*no folder"):
        load_squad(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"train-v1\.1\.json: not found, nor train-v2\.0\.json"):
        load_squad(tmp_path)
    write_files(tmp_path, "v1.1", "v2.0")
    with pytest.raises(UserError, match="choose one with --version"):
        load_squad(tmp_path)
    assert [len(split) for split in load_squad(tmp_path, "v2.0")[1:]] == [16, 16]
    assert load_squad(tmp_path, "v1.1").train[3] == Example(
        "q3", "Where does Dan live?", context_of(3), (Answer("old town of Cairo", 17),)
    )
    (tmp_path / "dev-v2.0.json").unlink()
    with pytest.raises(UserError, match=r"dev-v2\.0\.json: cannot be read"):
        load_squad(tmp_path, "v2.0")
    with pytest.raises(UserError, match=r"--version: found 'v3'"):
        load_squad(tmp_path, "v3")


def _paragraph(content: dict) -> dict:
    return content["data"][0]["paragraphs"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("data"), "needs `data`"),
        (lambda c: c.update(version="2.0"), "found version '2.0', expected v1.1"),
        (lambda c: c["data"].clear(), "found no question"),
        (lambda c: c["data"].append(3), r"data\[1\]: found int, needs `paragraphs`"),
        (lambda c: _paragraph(c).pop("context"), r"data\[0\]\.paragraphs\[0\]: found fields qas, needs `context`"),
        (lambda c: _paragraph(c)["qas"][0].pop("id"), r"qas\[0\]: found fields answers, question, needs `id`"),
        (lambda c: _paragraph(c)["qas"][0]["answers"].clear(), "found 0 answers where is_impossible is false"),
        (lambda c: _paragraph(c)["qas"][0].update(answers={"text": ["x"]}), "needs `answers` .list."),
        (lambda c: _paragraph(c)["qas"][0]["answers"][0].pop("answer_start"), "needs `answer_start`"),
    ],
)
def test_another_layout_is_one_line(tmp_path, change, message):
    content = file_content("v1.1")
    change(content)
    file = tmp_path / "train-v1.1.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as raised:
        read_examples(file, "v1.1")
    assert str(raised.value).startswith(str(file)) and "\n" not in str(raised.value)


def test_misplaced_answers_count_for_the_score_and_many_are_refused(tmp_path):
    content = file_content("v1.1")
    questions = _paragraph(content)["qas"]
    questions[0]["answers"][0]["answer_start"] += 1
    file = tmp_path / "dev-v1.1.json"
    file.write_text(json.dumps(content))
    examples = read_examples(file, "v1.1")
    assert examples[0].answers == (Answer("old town of Paris", -1),) and examples[1].answers[0].start > 0
    assert score(examples, {f"q{i}": "Old town of Paris." for i in range(8)})["exact"] == 1 / 8
    questions[0]["answers"] *= 8
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"found 8 answers that do not stand at answer_start .*, allowed are 7"):
        read_examples(file, "v1.1")
    file.write_text("[{")
    with pytest.raises(UserError, match="is not valid JSON"):
        read_examples(file, "v1.1")


@pytest.mark.parametrize("stride", [-1, 29, 400])
def test_a_stride_without_room_is_refused(words, stride):
    with pytest.raises(UserError, match=f"--stride: found {stride}, allowed are 0 to 28 beside --max-length 96"):
        windows([], words, max_length=96, stride=stride, labelled=False)
