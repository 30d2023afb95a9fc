"""GLUE, SQuAD and plans: options, checkpoints, examples, results and files that are not what they should be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from case import Case, Workspace

from homodistil.planning.machine_calibration import FORMAT
from homodistil.planning.step_work import NAMES

QUERY = "bert.encoder.layer.0.attention.self.query.weight"
ROWS = [["index", "sentence1", "sentence2", "label"], *([str(i), "a b", "c d", "entailment"] for i in range(4))]
RESULT = "rte/lr0.001-batch4-epochs1-seed0.json"


def _glue(w: Workspace, *options: str) -> list[str]:
    """A run on RTE; whatever the case has written before is left alone. `options` win."""
    for name in ("train.tsv", "dev.tsv"):
        _write(w.folder / "glue" / "RTE" / name, "\n".join("\t".join(row) for row in ROWS) + "\n")
    _write(w.folder / "out" / "mine.txt", "precious")
    given = ["--checkpoint", str(w.teacher), "--tasks", "rte", "--data", str(w.folder / "glue"), "--lr", "1e-3"]
    given += ["--batch-size", "4", "--epochs", "1", "--seeds", "0", "--max-length", "16", "--device", "cpu"]
    return ["glue", *given, "--out", str(w.folder / "out"), "--cache-dir", str(w.cache), *options]


def _squad(w: Workspace, *options: str, content: object = None) -> list[str]:
    """A run on SQuAD v1.1 whose training file is `content` (text, bytes or what becomes JSON)."""
    for name, item in (("dev", None), ("train", content)):
        item = _questions() if item is None else item
        text = item if isinstance(item, (str, bytes)) else json.dumps(item)
        _write(w.folder / "squad" / f"{name}-v1.1.json", text)
    given = ["--checkpoint", str(w.teacher), "--data", str(w.folder / "squad"), "--stride", "4", "--seeds", "0"]
    given += ["--lr", "1e-3", "--batch-size", "4", "--epochs", "1", "--max-length", "32", "--device", "cpu"]
    return ["squad", *given, "--out", str(w.folder / "out"), "--cache-dir", str(w.cache), *options]


def _questions(**changes: object) -> dict:
    answer = {"text": "fox", "answer_start": 4} | changes
    question = {"id": "q", "question": "who", "answers": [answer]}
    return {"version": "1.1", "data": [{"paragraphs": [{"context": "the fox jumps", "qas": [question]}]}]}


def _write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() and not path.is_symlink():
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _table(name: str, rows: str | bytes, says: str, header: str = "\t".join(ROWS[0]) + "\n") -> Case:
    """A training file of RTE."""

    def build(w: Workspace) -> list[str]:
        _write(
            w.folder / "glue" / "RTE" / "train.tsv", header.encode() + (rows.encode() if str is type(rows) else rows)
        )
        return _glue(w)

    return Case(f"tsv_with_{name}", build, says=["RTE/train.tsv", says], ranks=1)


def _question(name: str, content: object, says: str) -> Case:
    """A training file of SQuAD."""
    return Case(f"squad_{name}", lambda w: _squad(w, content=content), says=["squad/train-v1.1.json", says], ranks=1)


def _checkpoint(name: str, damage: Callable[[Workspace], object], *says: str, script: Callable = _glue) -> Case:
    said = ["--checkpoint", *says]
    return Case(name, lambda w: (damage(w), script(w))[1], says=said, ranks=1)


def _option(name: str, value: str, *says: str, script: Callable = _glue) -> Case:
    label = f"{script.__name__.strip('_')}_{name}_{value[:12]}"
    return Case(
        "".join(c if c.isalnum() else "_" for c in label),
        lambda w: script(w, f"--{name}={value}"),
        says=[f"--{name}", *says],
        ranks=1,
    )


def _result(w: Workspace, content: str) -> list[str]:
    _write(w.folder / "out" / RESULT, content)
    return _glue(w)


def _nan(tensors: dict) -> None:
    tensors[QUERY][0, 0] = float("nan")


def _without_query(tensors: dict) -> None:
    del tensors[QUERY]


def _fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


def _plan(name: str, says: str, make: Callable[[Path], object] = _fifo) -> Case:
    """A calibration that no measurement has left."""

    def build(w: Workspace) -> list[str]:
        make(path := w.folder / "calibration.json")
        return w.train("--device", "H100", "--calibration", str(path), script="plan")

    return Case(f"calibration_{name}", build, says=["--calibration", says], ranks=1)


def _calibration(value: float) -> dict:
    seconds = dict.fromkeys(NAMES, value)
    return {"format": FORMAT, "wall": seconds, "cpu": seconds, "process_bytes": 0, "error": 0.1, "machine": "here"}


OPTIONS = [
    _option("max-length", "1", "found 1, needed are at least 5"),
    _option("max-length", "4", "found 4, needed are at least 5"),
    _option("max-length", "1000000", "allows 32"),
    _option("max-length", "10000000000000", "allowed are whole numbers"),
    _option("lr", "nan", "found 'nan', allowed are numbers above 0"),
    _option("lr", "-1e-3", "above 0"),
    _option("lr", "1_0", "allowed are"),
    _option("epochs", "0", "found '0', allowed are whole numbers from 1"),
    _option("batch-size", "100000000000000000000", "to 1000000"),
    _option("seeds", "-1", "whole numbers from 0 to 4294967295"),
    _option("patience", "-1", "whole numbers from 0"),
    _option("device", "tpu", "choose from"),
    _option("tasks", "", "allowed: all, cola"),
    _option("checkpoint", "", "no name of a folder or model"),
    _option("checkpoint", "~nosuchuser/bert", "nosuchuser"),
    _option("out", "/proc/nothing/here", "cannot write"),
    _option("max-length", "5", "needs at least 68", script=_squad),
    _option("null-threshold", "nan", "allowed are numbers from", script=_squad),
    _option("stride", "-1", "whole numbers from 0", script=_squad),
    Case("glue_out_is_a_file", lambda w: _glue(w, "--out", str(w.engine)), says=["--out", "cannot write"], ranks=1),
    Case("squad_out_is_a_file", lambda w: _squad(w, "--out", str(w.engine)), says=["--out", "cannot write"], ranks=1),
    Case("glue_without_arguments", lambda w: ["glue"], says=["--checkpoint", "required"], ranks=1),
    Case(
        "glue_cache_is_a_file", lambda w: _glue(w, "--data=embedded", "--tasks=all", f"--cache-dir={w.engine}"), ranks=1
    ),
]

TABLES = [
    _table("nul", "0\ta\0b\tc\tentailment\n", "line 2: found a NUL character"),
    _table("latin_1", b"0\t\xe9\tc\tentailment\n", "bytes that are not UTF-8"),
    _table("another_label", "0\ta\tb\tyes\n", "line 2: found label 'yes', RTE allows entailment, not_entailment"),
    _table("five_fields", "0\ta\tb\tc\tentailment\n", "line 2: found 5 TAB-separated fields, RTE has 4"),
    _table("no_rows", "", "found no example"),
    _table("no_column", "0\ta\tentailment\n", "needs sentence1, sentence2, label", header="index\tsentence1\tlabel\n"),
    _table("nothing", "", "an empty file", header=""),
    Case(
        "tsv_is_a_fifo",
        lambda w: (_fifo(w.folder / "glue/RTE/train.tsv"), _glue(w))[1],
        says=["train.tsv: is not a regular file"],
        ranks=1,
    ),
    Case(
        "tsv_is_a_folder",
        lambda w: ((w.folder / "glue/RTE/train.tsv").mkdir(parents=True), _glue(w))[1],
        says=["train.tsv: is not a regular file"],
        ranks=1,
    ),
]

QUESTIONS = [
    _question("is_broken_json", '{"data": [', "is not valid JSON"),
    _question("is_a_list", [1], "no object with `version` and `data`"),
    _question("is_deep", "[" * 100_000, "is not valid JSON"),
    _question("in_latin_1", b'{"data": "\xe9"}', "is not valid JSON"),
    _question("has_a_long_number", '{"data": ' + "9" * 5000 + "}", "is not valid JSON"),
    _question("has_half_a_surrogate", _questions(text="\ud800"), "qas[0]: found half a surrogate pair in `text`"),
    _question("counts_with_true", _questions(answer_start=True), "found `answer_start` bool, needs `answer_start`"),
    _question("of_other_structure", {"data": [{"paragraphs": {"qas": 1}}]}, "data[0]: found `paragraphs` dict"),
    _question("has_no_question", {"data": []}, "found no question"),
    Case(
        "squad_is_a_fifo",
        lambda w: (_fifo(w.folder / "squad" / "train-v1.1.json"), _squad(w, "--version=v1.1"))[1],
        says=["train-v1.1.json: is not a regular file"],
        ranks=1,
    ),
]

CHECKPOINTS = [
    _checkpoint("glue_weights_are_nan", lambda w: w.edit_weights(_nan), QUERY, "1 NaN or infinite"),
    _checkpoint("squad_weights_are_nan", lambda w: w.edit_weights(_nan), QUERY, "1 NaN or infinite", script=_squad),
    _checkpoint("glue_weights_lack_a_tensor", lambda w: w.edit_weights(_without_query), "lack 1 tensor", QUERY),
    _checkpoint("squad_weights_lack_a_tensor", lambda w: w.edit_weights(_without_query), "lack 1", script=_squad),
    _checkpoint("glue_config_of_a_huge_vocabulary", lambda w: w.set_teacher(vocab_size=2 * 10**9), "2000000000 x 24"),
    _checkpoint("glue_config_of_a_million_layers", lambda w: w.set_teacher(num_hidden_layers=10**6), "1000000"),
    _checkpoint("glue_config_is_gone", lambda w: (w.teacher / "config.json").unlink(), "config.json is not there"),
    _checkpoint("glue_weights_are_gone", lambda w: (w.teacher / "model.safetensors").unlink(), "cannot load"),
    _checkpoint("glue_weights_are_garbage", lambda w: (w.teacher / "model.safetensors").write_bytes(b"\xff" * 999)),
    _checkpoint(
        "glue_weights_are_whole_numbers",
        lambda w: w.edit_weights(lambda t: {name: tensor.to(torch.int8) for name, tensor in t.items()}),
        "quantised or whole numbers",
    ),
    _checkpoint("glue_no_tokenizer", lambda w: [p.unlink() for p in w.teacher.glob("tok*")], "has no tokenizer"),
    _checkpoint(
        "squad_no_tokenizer", lambda w: [p.unlink() for p in w.teacher.glob("tok*")], "has no tokenizer", script=_squad
    ),
    _checkpoint("glue_tokenizer_is_broken", lambda w: (w.teacher / "tokenizer.json").write_text("{"), "not valid JSON"),
    _checkpoint("glue_config_is_a_fifo", lambda w: _fifo(w.teacher / "config.json"), "not a regular file"),
]

RESULTS = [
    Case("glue_result_is_broken", lambda w: _result(w, "{"), says=[RESULT, "found no result of a run"], ranks=1),
    Case(
        "glue_result_is_half_a_record",
        lambda w: _result(w, json.dumps({"task": "rte", "identity": {}, "result": {}, "setting": {"lr": 1}})),
        says=[RESULT, "found no result of a run"],
        ranks=1,
    ),
    Case("glue_result_is_deep", lambda w: _result(w, "[" * 100_000), says=[RESULT], ranks=1),
    Case("glue_result_is_a_fifo", lambda w: (_fifo(w.folder / "out" / RESULT), _glue(w))[1], says=[RESULT], ranks=1),
]

PLANS = [
    _plan("is_a_fifo", "not a regular file"),
    _plan("is_a_folder", "not a regular file", lambda path: path.mkdir()),
    _plan("is_deep", "recursion depth", lambda path: path.write_text("[" * 100_000)),
    _plan("is_a_list", "cannot use", lambda path: path.write_text("[]")),
    _plan("has_nan", "no measurement", lambda path: path.write_text(json.dumps(_calibration(float("nan"))))),
]

CASES = OPTIONS + TABLES + QUESTIONS + CHECKPOINTS + RESULTS + PLANS
