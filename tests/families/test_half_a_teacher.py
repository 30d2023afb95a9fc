"""A folder, a fraction and text are all that a run needs, whatever the family: on the command line and from Python.

The configurations are those of cases.py, so that a new family is held to it without a change here.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from families.cases import CASES, VOCABULARY
from support.fork_server import ROOT
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from homodistil.models import FAMILIES, family_of

TRAIN = ROOT / "launcher" / "train.py"
STEPS = 3
MODEL_TYPES = sorted(CASES)
FIRST_OF_A_FAMILY = {family.model_types[0] for family in FAMILIES.values()}
LETTERS = [chr(97 + i) for i in range(26)]
FROM_PYTHON = """
import sys, homodistil
run = homodistil.distill(sys.argv[1], sys.argv[2], size=0.5, steps=3)
is_it = sum(p.numel() for p in run.student.parameters()) == run.result[1]["parameters"]
print(is_it, "stock" if type(run.student).__module__.startswith("transformers.") else "ours")
"""


def word_pieces(pad_token_id: int) -> PreTrainedTokenizerFast:
    """Letters, and what masked models need; the padding token where the model expects it."""
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "mask")}
    words = [*special.values(), *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    words.insert(pad_token_id, "[PAD]")
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", **special)


def bytes_of_text() -> PreTrainedTokenizerFast:
    """The letters among GPT-2's bytes without any merge, and the token that ends a text, which is all that is needed.

    It has no padding token, as Llama's and GPT-2's have none.
    """
    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([end, "Ġ", *LETTERS])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end)


def write_teacher(folder: Path, model_type: str) -> Path:
    """A random model with its tokenizer."""
    config = CASES[model_type].make_config()
    family = family_of(model_type)
    # As every published one, it takes blocks of the default data.seq_len.
    config.max_position_embeddings = 96
    if family.is_causal and getattr(config, "sliding_window", None):
        config.sliding_window = 96
    torch.manual_seed(0)
    family.empty_model(config).save_pretrained(folder)
    tokenizer = bytes_of_text() if family.is_causal else word_pieces(config.pad_token_id or 0)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    for i in range(30):
        (folder / f"{i}.txt").write_text(" ".join("".join(draw.choices(LETTERS, k=3)) for _ in range(100)))
    return folder


def check_export(folder: Path, model_type: str) -> None:
    """A stock model of about half the parameters, and its tokenizer."""
    rows = json.loads((folder / "result.json").read_text())
    assert [row["name"] for row in rows] == ["teacher", "homodistil"]
    assert 0.4 < rows[1]["parameters"] / rows[0]["parameters"] < 0.6
    config = AutoConfig.from_pretrained(folder / "export")
    assert family_of(config.model_type) is family_of(model_type)
    assert config.hidden_size < CASES[model_type].make_config().hidden_size
    assert len(AutoTokenizer.from_pretrained(folder / "export")) <= VOCABULARY


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(model_type, marks=[] if model_type in FIRST_OF_A_FAMILY else pytest.mark.full)
        for model_type in MODEL_TYPES
    ],
)
def test_a_folder_a_fraction_and_text_are_enough(server, text, tmp_path, model_type):
    teacher = write_teacher(tmp_path / "teacher", model_type)
    fields = [f"teacher.name={teacher}", "student.size=0.5", f"data.sources=[{text}]"]
    faster = [f"train.steps={STEPS}"]
    job = server.start(TRAIN, fields + faster, num_ranks=1, env={"HOME": str(tmp_path)}, cwd=tmp_path)
    assert job.wait(timeout_s=120) == [0], job.output()
    (folder,) = (tmp_path / "runs").iterdir()
    check_export(folder, model_type)
    lines, task = job.output().splitlines(), family_of(model_type).task
    for begins in (f"task: {task}; ", "student: 2 layers, hidden ", "parameters: ", "losses: "):
        assert any(line.startswith(begins) for line in lines), job.output()


@pytest.mark.parametrize("model_type", ["roberta", "llama"])
def test_the_same_from_python(server, text, tmp_path, model_type):
    teacher = write_teacher(tmp_path / "teacher", model_type)
    (tmp_path / "program.py").write_text(FROM_PYTHON)
    job = server.start(
        tmp_path / "program.py", [str(teacher), str(text)], num_ranks=1, env={"HOME": str(tmp_path)}, cwd=tmp_path
    )
    assert job.wait(timeout_s=120) == [0], job.output()
    check_export(tmp_path / "runs" / "quickstart", model_type)
    assert job.output().rstrip().splitlines()[-1] == "True stock"
