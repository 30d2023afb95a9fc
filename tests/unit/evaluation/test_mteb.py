"""MTEB on embedders and rerankers: scores of retrieval data against ranking by stock classes, and what is refused.

The package is an extra. Where it is not installed, only what comes before it and behind it is tested.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest
import torch
from support.fork_server import ROOT
from support.tiny_decoder import make_decoder, make_tokenizer, write_text
from transformers import BertConfig, BertForSequenceClassification

from homodistil.errors import UserError
from homodistil.evaluation.mteb.command import main
from homodistil.evaluation.mteb.result_table import Scores, write_table

with_mteb = pytest.mark.skipif(importlib.util.find_spec("mteb") is None, reason="mteb is not installed")
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
DOCUMENTS = {
    "d1": ("cat", "the cat sees a dog."),
    "d2": ("", "a small bird finds the old house."),
    "d3": ("river", "and then the small river finds a tree slowly."),
    "d4": ("", "the dog hears the house again."),
}
QUERIES = {"q1": "a cat and a dog", "q2": "the river", "q3": "a bird finds a house", "q4": "nobody knows"}
RELEVANT = {"q1": {"d1": 2, "d4": 1}, "q2": {"d3": 1}, "q3": {"d2": 1}}


@pytest.fixture(scope="module")
def embedders(tmp_path_factory) -> list[Path]:
    """Two of random weights, of mean and of first token."""
    folder = tmp_path_factory.mktemp("embedders")
    tokenizer = make_tokenizer(write_text(folder / "text"))
    tokenizer.model_max_length, tokenizer.pad_token = 32, tokenizer.eos_token
    for pooling in ("mean_tokens", "cls_token"):
        make_decoder(BertConfig, len(tokenizer)).save_pretrained(folder / pooling)
        tokenizer.save_pretrained(folder / pooling)
        (folder / pooling / "modules.json").write_text(json.dumps(MODULES))
        (folder / pooling / "1_Pooling").mkdir()
        settings = {"word_embedding_dimension": 32, f"pooling_mode_{pooling}": True}
        (folder / pooling / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    return [folder / "mean_tokens", folder / "cls_token"]


@pytest.fixture
def search(tmp_path) -> Path:
    """A folder of retrieval data, in which a query has no relevant document."""
    folder = tmp_path / "my-search"
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": name, "title": title, "text": text} for name, (title, text) in DOCUMENTS.items()]
    corpus = [{key: value for key, value in row.items() if value} for row in corpus]
    queries = [{"_id": name, "text": text} for name, text in QUERIES.items()]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"{query}\t{name}\t{score}\n" for query, row in RELEVANT.items() for name, score in row.items()]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


@pytest.fixture(scope="module")
def rerankers(embedders) -> list[Path]:
    """Two of random weights, of one label each, with the tokenizer of the embedders."""
    folders = [embedders[0].parent / f"reranker{seed}" for seed in (1, 2)]
    for seed, folder in enumerate(folders, 1):
        shutil.copytree(
            embedders[0], folder, ignore=shutil.ignore_patterns("modules.json", "1_Pooling", "*.safetensors")
        )
        config = BertConfig.from_pretrained(embedders[0], num_labels=1)
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
    return folders


@with_mteb
def test_a_reranker_with_a_modules_file_is_one(rerankers, tmp_path):
    """As newer versions of sentence-transformers save it; one whose file is damaged is named."""
    from sentence_transformers import CrossEncoder

    from homodistil.evaluation.mteb.checkpoints import load

    CrossEncoder(str(rerankers[0]), device="cpu").save_pretrained(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "modules.json").is_file() and load(str(tmp_path / "saved"), "cpu").is_reranker
    (tmp_path / "saved" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"^--checkpoint: cannot load '.*saved'"):
        load(str(tmp_path / "saved"), "cpu")


def texts() -> list[str]:
    return [f"{title} {text}".strip() for title, text in DOCUMENTS.values()]


def by_vectors(folder: Path, query: str) -> list[str]:
    """Documents by the stock class, from the most to the least similar."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    similar = model.similarity(model.encode([query]), model.encode(texts()))[0]
    return [list(DOCUMENTS)[place] for place in similar.argsort(descending=True)]


def reranked(folder: Path, query: str, candidates: list[str]) -> list[str]:
    """Candidates by the stock class, from the highest to the lowest score."""
    from sentence_transformers import CrossEncoder

    known = dict(zip(DOCUMENTS, texts(), strict=True))
    scores = CrossEncoder(str(folder), device="cpu").predict([(query, known[name]) for name in candidates])
    return [candidates[place] for place in (-scores).argsort()]


def ndcg(order) -> float:
    """Mean over the queries with a relevant document of the order of documents that `order` gives a query. trec_eval's
    gain is the relevance itself."""
    values = []
    for query, relevant in RELEVANT.items():
        gains = [relevant.get(name, 0) for name in order(QUERIES[query])]
        best = sorted(relevant.values(), reverse=True)
        values.append(discounted(gains) / discounted(best))
    return sum(values) / len(values)


def discounted(gains: list[int]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))


@with_mteb
def test_scores_are_those_of_stock_vectors(embedders, search, tmp_path, capsys):
    names, out = list(map(str, embedders)), tmp_path / "out"
    words = ["--checkpoint", *names, "--tasks", str(search), "--device", "cpu", "--out", str(out)]
    main(words)
    content = json.loads((out / "mteb.json").read_text())
    assert list(content["checkpoints"]) == names and len(set(content["checkpoints"].values())) == 2
    scores = content["tasks"]["my-search"]
    for folder in embedders:
        assert scores[str(folder)]["main_score"] == pytest.approx(
            ndcg(partial(by_vectors, folder)), abs=1e-4
        )  # MTEB rounds to 5 digits
        assert content["mean"][str(folder)] == scores[str(folder)]["main_score"]
        assert "recall_at_10" in scores[str(folder)]["result"]["scores"]["test"][0]
    table = (out / "mteb.md").read_text()
    assert table in capsys.readouterr().out and table.count("| my-search | ndcg_at_10 |") == 1
    with pytest.raises(UserError, match="has the results of another call"):
        main(words)


@with_mteb
def test_rerankers_order_what_the_first_stage_has_found(embedders, rerankers, search, tmp_path):
    names, first, out = list(map(str, rerankers)), str(embedders[0]), tmp_path / "out"
    words = ["--checkpoint", *names, "--first-stage", first, "--top-k", "3", "--tasks", str(search), "--device", "cpu"]
    main([*words, "--out", str(out)])
    scores = json.loads((out / "mteb.json").read_text())["tasks"]["my-search"]
    assert list(scores) == [first, *names]
    assert scores[first]["main_score"] == pytest.approx(ndcg(partial(by_vectors, embedders[0])), abs=1e-4)
    for folder in rerankers:
        expected = ndcg(lambda query, folder=folder: reranked(folder, query, by_vectors(embedders[0], query)[:3]))
        assert scores[str(folder)]["main_score"] == pytest.approx(expected, abs=1e-4)
    assert len({round(result["main_score"], 4) for result in scores.values()}) > 1  # or nothing was told apart
    header = (out / "mteb.md").read_text().splitlines()[2]
    assert header == f"| task | metric | {' | '.join([*names, first])} |"


@with_mteb
@pytest.mark.parametrize(
    ("kinds", "first_stage", "task", "message"),
    [
        (
            "re",
            None,
            "search",
            r"^--checkpoint: '.*reranker1' is a reranker and '.*mean_tokens' an embedder",
        ),
        ("e", "x", "search", r"^--first-stage: found 'x', but there is no reranker in --checkpoint; leave it out$"),
        ("r", None, "search", r"^--first-stage: missing; on 'my-search' the reranker '.*' orders what an"),
        (
            "r",
            "x",
            "STSBenchmark",
            r"^--tasks: 'STSBenchmark' is of type STS, allowed .* are Retrieval, Reranking",
        ),
        ("r", "r", "search", r"^--first-stage: found '.*reranker1', which is a reranker; name an embedder$"),
        ("c", None, "search", r"^--checkpoint: '.*' is a classifier of 3 labels; a reranker has one"),
    ],
)
def test_kinds_that_do_not_fit_are_named(embedders, rerankers, search, tmp_path, kinds, first_stage, task, message):
    classifier = shutil.copytree(rerankers[0], tmp_path / "classifier")
    model = BertForSequenceClassification.from_pretrained(classifier, num_labels=3, ignore_mismatched_sizes=True)
    model.save_pretrained(classifier)
    folders = {"e": embedders[0], "r": rerankers[0], "c": classifier}
    words = ["--checkpoint", *(str(folders[kind]) for kind in kinds), "--out", str(tmp_path / "out")]
    words += ["--tasks", str(search) if task == "search" else task]
    with pytest.raises(UserError, match=message) as caught:
        main([*words, *(["--first-stage", str(folders.get(first_stage, first_stage))] if first_stage else [])])
    assert "\n" not in str(caught.value) and not list((tmp_path / "out").glob("*"))


@with_mteb
def test_names_are_those_of_mteb(embedders, tmp_path):
    from homodistil.evaluation.mteb.benchmark import open_tasks

    names = [task.metadata.name for task in open_tasks(["NanoBEIR", "STSBenchmark", "NanoNQRetrieval"])]
    assert len(names) == len(set(names)) == 14 and names[-1] == "STSBenchmark" and "NanoNQRetrieval" in names
    with pytest.raises(UserError, match=r"^--tasks: found 'STSBenchmrk', .*did you mean 'STSBenchmark'") as caught:
        open_tasks(["STSBenchmrk"])
    assert "\n" not in str(caught.value)


@with_mteb
def test_two_folders_of_one_name_are_refused(search, tmp_path):
    from homodistil.evaluation.mteb.benchmark import open_tasks

    twin = shutil.copytree(search, tmp_path / "twin" / search.name)
    with pytest.raises(
        UserError, match=r"^--tasks: .*twin/my-search' has the name of another task; rename the folder$"
    ):
        open_tasks([str(search), str(twin)])


@with_mteb
@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        (
            "corpus.jsonl",
            '{"_id": "d9"}',
            r"corpus\.jsonl:5: found .* expected a JSON object with the texts _id",
        ),
        ("queries.jsonl", "[1", r"queries\.jsonl:5: found \[1, expected"),
        ("qrels/test.tsv", "q1\td9\t1", r"test\.tsv:6: found .* the _id of a query, that of a document"),
        ("qrels/test.tsv", "q1 d1 1", r"test\.tsv:6: found"),
        ("qrels/test.tsv", None, r"cannot read .*test\.tsv \(No such file.*; a folder of retrieval data has corpus"),
    ],
)
def test_retrieval_data_that_do_not_fit_are_named(embedders, search, tmp_path, file, line, message):
    path = search / file
    if line is None:
        path.unlink()
    else:
        path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        main(["--checkpoint", str(embedders[0]), "--tasks", str(search), "--out", str(tmp_path / "out")])
    assert str(caught.value).startswith("--tasks: ") and "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*"))


@with_mteb
def test_the_mean_where_no_pooling_is_said(embedders, tmp_path, capsys):
    from homodistil.evaluation.mteb.checkpoints import load

    folder = shutil.copytree(embedders[0], tmp_path / "bare")
    (folder / "modules.json").unlink()
    bare, whole = (load(str(path), "cpu") for path in (folder, embedders[0]))
    text = DOCUMENTS["d1"][1]
    assert (bare.model.encode(text) == whole.model.encode(text)).all() and bare.identity != whole.identity
    assert "has no modules.json" in capsys.readouterr().out


@with_mteb
def test_a_folder_that_is_not_there_is_named(search, tmp_path):
    with pytest.raises(UserError, match=r"^--checkpoint: no folder '.*nowhere'"):
        main(["--checkpoint", str(tmp_path / "nowhere"), "--tasks", str(search), "--out", str(tmp_path / "out")])


def test_without_the_extra_it_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)  # what an import of a package that is not there looks like
    with pytest.raises(UserError, match=r"^mteb: mteb cannot be imported .* install it with pip install") as caught:
        main(["--checkpoint", "x", "--tasks", "x", "--out", str(tmp_path / "out")])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["mteb"]
    assert wanted[0] in str(caught.value)


def test_the_table_of_what_is_scored_so_far(tmp_path):
    """A task that the second checkpoint has not finished is in no mean."""
    scores = Scores({"a|b": "1", "c": "2"})
    for task, name, value in (("one", "a|b", 0.5), ("one", "c", 0.4), ("two", "a|b", 0.75)):
        result = {"task_name": task, "mteb_version": "2.26"}
        scores.add(name, {"main_score": value, "metric": "map", "parameters": 1_230_000, "result": result})
    assert write_table(scores, tmp_path).splitlines()[2:8] == [
        "| task | metric | a\\|b | c |",
        "| --- | --- | --: | --: |",
        "| parameters, M |  | 1.2 | 1.2 |",
        "| one | map | 0.5000 | 0.4000 (80.0%) |",
        "| two | map | 0.7500 | - |",
        "| mean |  | 0.5000 | 0.4000 (80.0%) |",
    ]
    content = json.loads((tmp_path / "mteb.json").read_text())
    assert content["mean"] == {"a|b": 0.5, "c": 0.4} and content["tasks"]["two"].keys() == {"a|b"}
