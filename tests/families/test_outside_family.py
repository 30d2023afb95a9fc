"""docs/add-a-family.md to the letter: its files are written, its commands run, and a new architecture is trained."""

from __future__ import annotations

import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from families.test_half_a_teacher import LETTERS, word_pieces
from support.fork_server import ROOT
from transformers import AutoModelForMaskedLM, Data2VecTextConfig, Data2VecTextForMaskedLM

import homodistil.models
from homodistil.config.plugins import load_plugins
from homodistil.errors import UserError
from homodistil.models import FAMILIES, family_of, register

PAGE = ROOT / "docs" / "add-a-family.md"
MODEL_TYPE = "data2vec-text"


class Page(NamedTuple):
    files: dict[str, str]
    """Name -> content of the Python files on the page, whose first line is their name."""
    commands: list[list[str]]
    """Words of the commands on the page, in their order."""


def read_page() -> Page:
    text = PAGE.read_text(encoding="utf-8")
    files = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    commands = re.findall(r"^```bash\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    return Page(files, [shlex.split(line) for command in commands for line in command.splitlines()])


@pytest.fixture
def folder(tmp_path) -> Path:
    """The page's files, a checkpoint `teacher` of the new architecture, and `text`."""
    for name, content in read_page().files.items():
        (tmp_path / name).write_text(content)
    config = Data2VecTextConfig(
        vocab_size=64,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=80,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    Data2VecTextForMaskedLM(config).save_pretrained(tmp_path / "teacher")
    word_pieces(pad_token_id=1).save_pretrained(tmp_path / "teacher")
    (tmp_path / "text").mkdir()
    draw = random.Random(0)
    for i in range(30):
        (tmp_path / "text" / f"{i}.txt").write_text(" ".join("".join(draw.choices(LETTERS, k=3)) for _ in range(100)))
    return tmp_path


def conformance(folder: Path) -> subprocess.CompletedProcess:
    """The page's first command."""
    assignment, *command = read_page().commands[0]
    name, _, value = assignment.partition("=")
    words = [word.replace("$HOMODISTIL", str(ROOT)) for word in command]
    assert name == "PYTHONPATH" and words[:3] == ["python", "-m", "pytest"]
    # Beside the folders that the page names: where this process has its packages from.
    path = os.pathsep.join([value.replace("$HOMODISTIL", str(ROOT)), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path}
    options = ["-q", "-p", "no:cacheprovider"]
    line = [sys.executable, *words[1:], *options]
    return subprocess.run(line, cwd=folder, env=environment, text=True, capture_output=True, timeout=200)


def homodistil_command(server, folder: Path, words: list[str], code: int = 0) -> str:
    """What a command of the page writes. The imports are those of the fork server."""
    assert words[0] == "homodistil"
    job = server.start("homodistil.cli:run", [words[1], words[2:]], num_ranks=1, env={"HOME": str(folder)}, cwd=folder)
    assert job.wait(timeout_s=120) == [code], job.output()
    return job.output()


def test_the_page_adds_a_family(server, folder):
    page = read_page()
    assert sorted(page.files) == ["case_data2vec_text.py", "data2vec_text.py"] and len(page.commands) == 3
    assert MODEL_TYPE not in FAMILIES and len(page.files["data2vec_text.py"].splitlines()) <= 30
    done = conformance(folder)
    assert done.returncode == 0 and re.search(r"^[12]\d passed", done.stdout, re.MULTILINE), done.stdout
    axes, train = page.commands[1:]
    listing = homodistil_command(server, folder, axes)
    assert f": {MODEL_TYPE}, " in listing and "data2vec_text.encoder.layer.*.output.dense.weight" in listing
    output = homodistil_command(server, folder, train)
    assert "task: mlm; " in output and "compensation full" in output
    student = AutoModelForMaskedLM.from_pretrained(folder / "runs" / "quickstart" / "export")
    assert type(student) is Data2VecTextForMaskedLM and student.config.hidden_size < 24


@pytest.mark.parametrize("words", [["axes", "--teacher", "teacher"], ["train", "teacher.name=teacher"]])
def test_without_the_plugin_it_is_refused(server, folder, words):
    output = homodistil_command(server, folder, ["homodistil", *words], code=2)
    line = output.strip().splitlines()[-1]
    assert line.startswith(f"error: teacher.name: architecture '{MODEL_TYPE}' is not supported") and "plugins" in line


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("data2vec_text.py", "        positions_start_behind_padding=True,\n"),
        ("case_data2vec_text.py", '    untouched=("lm_head.bias",),\n'),
    ],
    ids=["positions", "untouched"],
)
@pytest.mark.full
def test_a_family_that_says_too_little_does_not_conform(folder, file, line):
    content = (folder / file).read_text()
    assert line in content
    (folder / file).write_text(content.replace(line, ""))
    done = conformance(folder)
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout


OWN_ARCHITECTURE = """
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from homodistil.models import register
from homodistil.models.decoders.pre_norm import PreNormDecoder


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


AutoConfig.register("own-llama", OwnConfig)
AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)
register(PreNormDecoder(name="own", model_types=("own-llama",)))
"""
FROM_PYTHON = """
import sys
from pathlib import Path

import homodistil
from homodistil.config.plugins import load_plugins
from support.tiny_decoder import write_decoder, write_text

plugins = [str(Path("own_llama.py").resolve())]
load_plugins(plugins, "teacher.plugins")
kind = sys.modules["homodistil_plugin_own_llama"].OwnConfig
teacher = write_decoder(Path("teacher"), kind, write_text(Path("text")))
run = homodistil.distill(teacher, "text", size=0.5, steps=2, **{"teacher.plugins": plugins})
print(type(run.student).__name__, run.student.config.hidden_size < 48)
"""


def test_an_architecture_that_transformers_does_not_have(server, tmp_path):
    (tmp_path / "own_llama.py").write_text(OWN_ARCHITECTURE)
    (tmp_path / "program.py").write_text(FROM_PYTHON)
    job = server.start(tmp_path / "program.py", num_ranks=1, env={"HOME": str(tmp_path)}, cwd=tmp_path)
    assert job.wait(timeout_s=120) == [0], job.output()
    assert job.output().rstrip().splitlines()[-1] == "OwnForCausalLM True"


def test_what_cannot_be_registered(folder, monkeypatch):
    monkeypatch.setattr(homodistil.models, "FAMILIES", known := dict(FAMILIES))
    load_plugins([str(folder / "data2vec_text.py")], "teacher.plugins")
    family = family_of(MODEL_TYPE)
    assert register(family) is family and known[MODEL_TYPE] is family
    again = folder / "again.py"
    again.write_text((folder / "data2vec_text.py").read_text())
    with pytest.raises(
        UserError, match=r"^teacher\.plugins: the family 'data2vec-text' registers model_type 'data2vec-t"
    ):
        load_plugins([str(again)], "teacher.plugins")
    with pytest.raises(UserError, match=r"^teacher\.plugins: cannot import 'nowhere\.py' \(FileNotFoundError"):
        load_plugins(["nowhere.py"], "teacher.plugins")
