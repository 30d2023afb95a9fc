"""A prepared corpus that is cut short or deleted, while a job reads it and before one goes on."""

import hashlib
import json
import re
import shutil
import signal
import time

import numpy as np
import psutil
import pytest
from support.small_job import TRAIN, arguments, differences, result

from homodistil.config.schema import DataConfig
from homodistil.data.prepare.corpus import Rows, prepare_corpus
from homodistil.data.sources.file_hashes import content_hashes
from homodistil.distill.teacher import load_config, load_tokenizer
from homodistil.distributed.exit_codes import USER_ERROR
from homodistil.errors import UserError


def _blocks(cache):
    (path,) = (cache / "corpora").glob("*/train.npy")
    return path


def _truncate(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corpus_that_is_cut_short_while_it_is_read(server, run_inputs, reference, tmp_path, workers):
    """Both ranks stand still (SIGSTOP) in a step while half the file goes; on resume it is prepared again."""
    cache, folder = tmp_path / "cache", tmp_path / "run"
    shutil.copytree(run_inputs / "cache", cache)
    own = arguments(run_inputs, folder, "run.resume=auto", f"data.cache_dir={cache}", f"data.workers={workers}")
    job = server.start(TRAIN, own, env={"HOMODISTIL_FAULT": "train.step:hit=6:action=stop"})
    while not all(psutil.Process(pid).status() == psutil.STATUS_STOPPED for pid in job.pids):
        assert job.is_running(), job.output()
        time.sleep(0.02)
    _truncate(_blocks(cache))
    job.kill(None, signal.SIGCONT)
    assert job.wait(timeout_s=180) == [USER_ERROR] * 2, job.output()
    (line,) = [line for line in job.output().splitlines() if line.startswith("error")]
    assert f"{_blocks(cache)}: was cut short while it was being read; run again with run.resume=auto" in line
    assert "Traceback" not in job.output()
    job = server.start(TRAIN, own)
    assert job.wait(timeout_s=180) == [0, 0], job.output()
    assert f"warning: {_blocks(cache).parent} is damaged (" in job.output(0) + job.output(1)
    assert differences(result(folder), result(reference)) == []


def _overwrite(offset: int, content: bytes):
    def damage(path):
        with open(path, "r+b") as file:
            file.seek(offset, 0 if offset >= 0 else 2)
            file.write(content)

    return damage


def _swap_blocks(path):
    blocks = np.load(path)
    blocks[[0, 1]] = blocks[[1, 0]]
    np.save(path, blocks)


def _as_folder(path):
    path.unlink()
    path.mkdir()


def _edit(**changes):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train.npy", _overwrite(-10, b"\1\2")),
        ("heldout.npy", _swap_blocks),
        ("train.npy", _truncate),
        ("train.npy", _as_folder),
        ("train.npy", _overwrite(0, b"PK\3\4")),  # taken for a zip archive
        ("train.npy", _overwrite(10, b"\xff" * 20)),
        ("heldout.npy", _overwrite(10, b"{'descr': '|O', ((((")),
        ("corpus.json", _overwrite(0, b"\xff\xfe")),
        ("corpus.json", _edit(train={"blocks": 3})),
        ("manifest.json", lambda path: path.unlink()),
        ("manifest.json", _overwrite(0, b"[[[[")),
        ("manifest.json", lambda path: path.write_bytes(b"[" * 100_000)),
        ("manifest.json", _edit(sha256=None)),
        ("manifest.json", _edit(sha256={"train.npy": "0", "heldout.npy": "0"})),
        ("", lambda path: (shutil.rmtree(path), path.write_text("no folder"))),
    ],
)
def test_every_damage_to_a_corpus_is_noticed_once(
    teacher_tokenizer, run_inputs, prepared, tmp_path, capfd, name, damage
):
    cache = tmp_path / "cache"
    shutil.copytree(prepared, cache)
    folder = _blocks(cache).parent
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    damage(folder / name if name else folder)
    config = DataConfig(sources=[f"{run_inputs}/text"], seq_len=16, heldout_fraction=0.2, cache_dir=str(cache))
    prepare_corpus(config, teacher_tokenizer)
    assert capfd.readouterr().err.count("is damaged (") == 1
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.fixture(scope="module")
def teacher_tokenizer(run_inputs):
    return load_tokenizer(f"{run_inputs}/teacher", load_config(f"{run_inputs}/teacher"))


@pytest.fixture(scope="module")
def prepared(teacher_tokenizer, run_inputs, tmp_path_factory):
    """A cache with the corpus."""
    cache = tmp_path_factory.mktemp("prepared")
    config = DataConfig(sources=[f"{run_inputs}/text"], seq_len=16, heldout_fraction=0.2, cache_dir=str(cache))
    prepare_corpus(config, teacher_tokenizer)
    return cache


def test_a_large_corpus_is_hashed_beside_training(server, run_inputs, reference, tmp_path):
    """Damaged, it ends the job before a checkpoint; undamaged, the job ends as ever."""
    cache, folder = tmp_path / "cache", tmp_path / "run"
    shutil.copytree(run_inputs / "cache", cache)
    _overwrite(-10, b"\1\2")(_blocks(cache))
    own = arguments(run_inputs, folder, "run.resume=auto", f"data.cache_dir={cache}")
    job = server.start("fault_jobs:train_with_large_corpus", [own])
    assert job.wait(timeout_s=180) == [USER_ERROR] * 2, job.output()
    (line,) = [line for line in job.output().splitlines() if line.startswith("error")]
    assert "train.npy has another sha256 than manifest.json says" in line and "run again with run.resume=auto" in line
    assert not list(folder.rglob("*.safetensors")) and not list((cache / "corpora").glob("[!.]*"))
    for _ in range(2):  # prepared again; then hashed beside training, found undamaged
        job = server.start("fault_jobs:train_with_large_corpus", [own])
        assert job.wait(timeout_s=180) == [0, 0], job.output()
        assert "damaged" not in job.output()
    assert differences(result(folder), result(reference)) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"\xff\xfe",
        lambda text: text[:-9],
        lambda text: b"[]",
        lambda text: b"[" * 100_000,
        lambda text: re.sub(rb'"[0-9a-f]{64}"', lambda m: m.group()[:-2] + b'0"', text),
        lambda text: re.sub(rb'"[0-9a-f]{64}"', b"3", text),
        lambda text: re.sub(rb"\[.*?\]", b'"x"', text),
    ],
)
def test_remembered_hashes_that_are_damaged_are_made_again(tmp_path, capfd, damage):
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_text(file.name)
    expected = content_hashes(files, tmp_path / "cache")
    assert expected == [hashlib.sha256(file.name.encode()).hexdigest() for file in files]
    (memory,) = (tmp_path / "cache" / "file_hashes").glob("*.json")
    before = memory.read_bytes()
    memory.write_bytes(damage(before))
    assert content_hashes(files, tmp_path / "cache") == expected
    assert capfd.readouterr().err.count("warning: ") == 1
    assert memory.read_bytes() == before


@pytest.mark.parametrize("damage", ["train.npy", "heldout.npy", "corpus.json", "empty"])
def test_a_damaged_corpus_is_prepared_again(server, run_inputs, tmp_path, damage):
    cache = tmp_path / "cache"
    shutil.copytree(run_inputs / "cache", cache)
    path = _blocks(cache)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    if damage == "empty":
        path.write_bytes(b"")
    else:
        path.with_name(damage).unlink()
    job = server.start("fault_jobs:prepare", [str(run_inputs), str(cache)], num_ranks=2)
    assert job.wait(timeout_s=180) == [0, 0], job.output()
    assert job.output().count("is damaged") == 1
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_a_deleted_file_is_read_on_while_it_is_open(tmp_path):
    np.save(tmp_path / "train.npy", np.arange(200, dtype=np.uint16).reshape(20, 10))
    rows = Rows(tmp_path / "train.npy")
    (tmp_path / "train.npy").unlink()
    assert rows[[19]].tolist() == [list(range(190, 200))]


def test_a_file_that_is_cut_short_is_not_touched(tmp_path):
    np.save(tmp_path / "train.npy", np.zeros((1000, 100), dtype=np.uint16))
    rows = Rows(tmp_path / "train.npy")
    _truncate(tmp_path / "train.npy")
    with pytest.raises(UserError, match="train.npy: was cut short while it was being read"):
        rows[[999]]
