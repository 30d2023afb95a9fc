"""Reading what somebody else wrote never runs their code: weights, tokenizers and configs that try to."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.small import plain_run, small_model
from transformers import BertTokenizerFast

from homodistil.config.schema import RunConfig
from homodistil.distill.teacher import _from_pretrained, load_config, load_model, load_tokenizer
from homodistil.errors import UserError
from homodistil.training.teacher_checks import check_teacher


class Trap:
    """Unpickled without care, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def caught(tmp_path) -> Path:
    """The file that appears when the trap has worked."""
    return tmp_path / "caught"


@pytest.fixture
def teacher(tmp_path) -> Path:
    """A teacher with a tokenizer and weights that are a pickle."""
    folder = tmp_path / "teacher"
    small_model().save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(folder)
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    return folder


def _config(teacher: Path, allow_pickle: bool = False) -> RunConfig:
    config = plain_run()
    config.teacher.name, config.teacher.allow_pickle = str(teacher), allow_pickle
    config.student.hidden_size, config.student.intermediate_size, config.student.num_attention_heads = 12, 20, 4
    config.data.seq_len, config.pruning.max_event_fraction = 16, 1.0
    return config


def test_the_trap_works(caught):
    pickle.loads(pickle.dumps(Trap(caught)))
    assert caught.exists()


def test_pickled_weights_are_refused_and_named(teacher, caught):
    (teacher / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(caught)))
    with pytest.raises(UserError) as refused:
        check_teacher(_config(teacher))
    assert not caught.exists() and "\n" not in str(refused.value)
    assert f"teacher.name: '{teacher}' has pickled weights only (.bin)" in str(refused.value)
    assert "model.safetensors" in str(refused.value) and "teacher.allow_pickle=true" in str(refused.value)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_allowed_pickles_run_nothing_either(teacher, caught, save):
    save({"bert.embeddings.word_embeddings.weight": Trap(caught)}, teacher / "pytorch_model.bin")
    with pytest.raises(UserError, match="teacher.name: cannot load weights from"):
        check_teacher(_config(teacher, allow_pickle=True))
    assert not caught.exists()


def test_harmless_pickles_are_refused_as_well(teacher):
    """Nobody can tell before reading them."""
    with pytest.raises(UserError, match="has pickled weights only"):
        check_teacher(_config(teacher))
    with pytest.raises(UserError, match="has pickled weights only"):
        load_model(str(teacher))


def test_allowed_pickles_of_plain_weights_load(teacher):
    assert check_teacher(_config(teacher, allow_pickle=True)) == str(teacher)
    loaded = load_model(str(teacher), allow_pickle=True).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in small_model().state_dict().items())


def test_a_pickle_that_is_called_safetensors_runs_nothing(teacher, caught):
    (teacher / "model.safetensors").write_bytes(pickle.dumps(Trap(caught)))
    with pytest.raises(UserError, match=r"teacher.name: .*model\.safetensors is no readable safetensors file"):
        check_teacher(_config(teacher))
    assert not caught.exists()


def test_code_beside_the_weights_is_not_run(teacher, caught):
    """What the library would offer to run (and ask for, on a terminal) as `trust_remote_code`."""
    (teacher / "theirs.py").write_text(f"open({str(caught)!r}, 'w')\nConfig = Tokenizer = Model = None\n")
    config = json.loads((teacher / "config.json").read_text())
    theirs = {"AutoConfig": "theirs.Config", "AutoModelForMaskedLM": "theirs.Model"}
    (teacher / "config.json").write_text(json.dumps(config | {"auto_map": theirs}))
    tokenizer = json.loads((teacher / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["theirs.Tokenizer", None]}
    (teacher / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="teacher.name: .*config.json: found auto_map"):
        load_model(str(teacher), allow_pickle=True)
    with pytest.raises(UserError, match="teacher.name: .*tokenizer_config.json has auto_map"):
        load_tokenizer(str(teacher), small_model().config)
    # Nor where nothing of ours stands before the library.
    _from_pretrained(str(teacher), allow_pickle=True)
    (teacher / "config.json").write_text(json.dumps(config | {"model_type": "theirs"}))
    with pytest.raises(UserError, match="teacher.name: no model at"):
        load_config(str(teacher))
    assert not caught.exists()
