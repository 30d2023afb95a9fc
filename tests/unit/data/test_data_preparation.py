"""Preparation in shards: the same bytes whatever the workers, tasks, kills and damage; what is finished stays."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from support.fork_server import Job

from homodistil.config.schema import DataConfig
from homodistil.data.prepare.array_tasks import split_task
from homodistil.data.prepare.corpus import prepare_corpus, prepare_share
from homodistil.data.prepare.shard_plan import make_plan
from homodistil.data.sources.documents import read
from homodistil.data.sources.sources import Source
from homodistil.data.sources.text_files import TextFile
from homodistil.distributed.exit_codes import STOPPED, USER_ERROR
from homodistil.errors import UserError

pytestmark = pytest.mark.process

SCRIPT = Path(__file__).parents[3] / "launcher" / "prepare_data.py"
WORDS = "The whale, unbelievably große – swims: past Nantucket's islands again! naïve 1851 tokenization".split()
SHARD_BYTES = 40_000
SMALL_SHARD_BYTES = 4_000  # some hundred shards: time to interfere


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[str]:
    """Lines, paragraphs and small files: 4 sources of some 100 kB, in many shards."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)

    def some(count: int) -> list[str]:
        return [f"{i}: " + " ".join(rng.choices(WORDS, k=rng.choice([5, 50, 700]))) for i in range(count)]

    lines = [json.dumps({"text": text}) for text in some(90)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "books" / "deeper").mkdir(parents=True)
    for i, text in enumerate(some(60)):
        (folder / "books" / ("deeper" if i % 2 else ".") / f"{i}.txt").write_text(text)
    (folder / "one.txt").write_text("\n\n".join(some(80)))
    return [str(folder / name) for name in ("a.jsonl", "books", "one.txt")]


def config_of(texts, cache: Path, **fields) -> DataConfig:
    return DataConfig(sources=texts, cache_dir=str(cache), **({"shard_bytes": SHARD_BYTES} | fields))


def content(cache: Path) -> dict[str, bytes]:
    (folder,) = (path for path in (cache / "corpora").iterdir() if path.is_dir())
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def reference(texts, tokenizer, tmp_path_factory) -> dict[str, bytes]:
    cache = tmp_path_factory.mktemp("reference")
    prepare_corpus(config_of(texts, cache), tokenizer)
    return content(cache)


def start(server, texts, cache: Path, *arguments: str) -> Job:
    """The script in a session of its own."""
    fields = [f"data.sources=[{','.join(texts)}]", f"data.cache_dir={cache}", f"data.shard_bytes={SMALL_SHARD_BYTES}"]
    return server.start(SCRIPT, [*fields, *arguments], num_ranks=1)


@pytest.fixture
def cache(tmp_path, cache_dir) -> Path:
    """An empty cache with the packaged teacher in it."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "assets").symlink_to(cache_dir / "assets")
    return tmp_path / "cache"


def summaries(cache: Path) -> dict[Path, int]:
    """Summary of each finished shard, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in cache.glob("parts/*/[0-9]*/summary.json")}


def wait_for_shards(job: Job, cache: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(summaries(cache)) < count:
        assert job.is_running() and time.monotonic() < deadline, job.output()
        time.sleep(0.002)


def test_the_plan_cuts_between_documents(tokenizer, texts, reference, tmp_path):
    """Documents, and so blocks, do not depend on where shards end; only the manifest names them."""
    prepare_corpus(config_of(texts, tmp_path, shard_bytes=1 << 30), tokenizer)
    whole = content(tmp_path)
    assert json.loads(reference["manifest.json"])["sources"] == json.loads(whole["manifest.json"])["sources"]
    assert len(json.loads(reference["manifest.json"])["shards"]) > 8 > len(json.loads(whole["manifest.json"])["shards"])
    for name in ("train.npy", "heldout.npy", "corpus.json"):
        assert whole[name] == reference[name], name


@pytest.mark.parametrize("shard_bytes", [1, 2, 7, 11, 100])
def test_paragraphs_are_cut_at_blank_lines_only(tmp_path, shard_bytes):
    (tmp_path / "a.txt").write_text("first\nline\n\n\n \nsecond\n\u3000\nthird\nends here\n\n")
    source = Source(name="a", text_column="text", text_documents="paragraph", files=[TextFile(str(tmp_path / "a.txt"))])
    plan = make_plan([source], shard_bytes, "")
    documents = ["".join(d) for shard in plan.shards for span in shard.spans for d in read(source, span)]
    assert documents == ["first\nline\n", "second\n", "third\nends here\n"]


def test_workers_make_the_same_bytes(tokenizer, texts, reference, tmp_path):
    prepare_corpus(config_of(texts, tmp_path, workers=2), tokenizer)
    assert content(tmp_path) == reference
    assert not list((tmp_path / "parts").glob("[!.]*")), "shards are given up once the corpus is there"


def test_tasks_make_the_same_bytes_and_the_last_one_merges(tokenizer, texts, reference, tmp_path):
    config = config_of(texts, tmp_path)
    for task in (2, 0):
        said = prepare_share(config, tokenizer, task, 3)
        assert re.match(rf"task {task} of 3 is done; \d+ of \d+ shards are left to other tasks; the last", said)
    prepare_corpus(config_of(texts, tmp_path, shard_bytes=1 << 20, seq_len=32), tokenizer)  # another starter's
    assert not isinstance(prepare_share(config, tokenizer, 1, 3), str)
    found = {path.parent.name: path.read_bytes() for path in (tmp_path / "corpora").glob("*/manifest.json")}
    assert len(found) == 2 and reference["manifest.json"] in found.values()
    assert prepare_share(config, tokenizer, 0, 3).fingerprint in found, "a late task finds the corpus"


def test_killed_twice_and_gone_on_with(server, texts, reference, cache):
    """kill -9 of everything in the middle; what was finished is not made again, and the result is the same."""
    for finished in (5, 30):
        job = start(server, texts, cache, "data.workers=2")
        wait_for_shards(job, cache, finished)
        os.killpg(job.pids[0], signal.SIGKILL)
        assert job.wait(timeout_s=60) == [-signal.SIGKILL], job.output()
    before = summaries(cache)
    assert not list(cache.glob("corpora/*/train.npy"))
    job = start(server, texts, cache, "--task", "0", "--tasks", "2")
    assert job.wait(timeout_s=60) == [0] and "shards are left to other tasks" in job.output(), job.output()
    assert before.items() < summaries(cache).items(), "finished shards are not made again"
    job = start(server, texts, cache)
    assert job.wait(timeout_s=60) == [0], job.output()
    assert {name: value for name, value in content(cache).items() if name != "manifest.json"} == {
        name: value for name, value in reference.items() if name != "manifest.json"
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop(server, texts, reference, cache, number):
    job = start(server, texts, cache, "data.workers=2", "--task", "0", "--tasks", "2")
    wait_for_shards(job, cache, 2)
    os.killpg(job.pids[0], number)
    assert job.wait(timeout_s=60) == [STOPPED], job.output()
    assert f"stopped by {number.name}" in job.output() and "Traceback" not in job.output(), job.output()
    assert len(summaries(cache)) >= 2


@pytest.mark.parametrize("damage", ["empty", "short", "altered", "no summary", "torn summary"])
def test_a_damaged_shard_is_made_again(tokenizer, texts, reference, tmp_path, capfd, damage):
    config = config_of(texts, tmp_path)
    prepare_share(config, tokenizer, 0, 2)
    shard = sorted(tmp_path.glob("parts/*/00002"))[0]
    tokens, summary = shard / "tokens.bin", shard / "summary.json"
    before = tokens.read_bytes()
    if damage == "no summary":
        summary.unlink()
    elif damage == "torn summary":
        summary.write_text(summary.read_text()[:40])
    else:
        tokens.write_bytes({"empty": b"", "short": before[:-1], "altered": before[:-1] + b"\xff"}[damage])
    prepare_corpus(config, tokenizer)
    assert content(tmp_path) == reference
    assert f"warning: {shard} is damaged (" in capfd.readouterr().err


def test_mistakes_in_a_worker_are_one_line_and_lose_nothing(server, texts, cache, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps({"text": f"{i} " * 2000}) + "\n" for i in range(60)) + "{'text': 1}\n")
    job = start(server, [*texts, str(bad)], cache, "data.workers=2")
    assert job.wait(timeout_s=60) == [USER_ERROR] and "Traceback" not in job.output(), job.output()
    (line,) = [line for line in job.output().splitlines() if line.startswith("error")]
    assert f"data.sources: {bad}:61: not valid JSON" in line, "the line of the file, not of the shard"
    assert summaries(cache)


def test_manifest(reference, texts):
    manifest = json.loads(reference["manifest.json"])
    assert [source["name"] for source in manifest["sources"]] == texts
    documents = [source["train"]["documents"] + source["heldout"]["documents"] for source in manifest["sources"]]
    assert documents == [90, 60, 1] and not any(source["dropped"] for source in manifest["sources"])
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256(reference[name]).hexdigest() == digest


def test_task_arguments():
    assert split_task(["data.workers=2"]) == ((0, 1), ["data.workers=2"])
    assert split_task(["--task", "3", "a.b=c", "--tasks=8"]) == ((3, 8), ["a.b=c"])
    for argv, pattern in (
        (["--task", "8", "--tasks", "8"], r"--task: found 8 of --tasks 8, allowed are 0 .. --tasks - 1; number array"),
        (["--task", "-1", "--tasks", "8"], r"--task: "),
        (["--task", "x", "--tasks", "8"], r"--task: found x"),
        (["--tasks", "8"], r"--task: missing; give both"),
        (["--task", "8"], r"--tasks: missing; give both"),
        (["--task"], r"--task: expected a number"),
    ):
        with pytest.raises(UserError, match=pattern):
            split_task(argv)
