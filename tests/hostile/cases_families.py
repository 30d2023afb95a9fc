"""Decoders and encoders that are taken for each other, groups of heads, and architectures that have no axes here."""

from __future__ import annotations

import json
from pathlib import Path

from case import Case, Workspace
from support.tiny_decoder import write_decoder, write_text
from transformers import LlamaConfig

_SIZE_AND_HEADS = ("student.intermediate_size=null", "student.size=0.5", "student.head_dim=4")


def _decoder(w: Workspace, *overrides: str, script: str = "train") -> list[str]:
    """A run of a Llama with 6 query heads in 3 groups; `overrides` win."""
    folder = w.folder / "decoder"
    if not folder.exists():
        write_decoder(folder, LlamaConfig, write_text(w.folder / "words", num_documents=20))
    sizes = ("student.hidden_size=36", "student.num_attention_heads=4", f"data.sources=[{w.folder / 'words'}]")
    options = ["--device", "H100"] if script == "plan" else []
    return w.train(*options, f"teacher.name={folder}", *sizes, *overrides, script=script)


def _set(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def _without_end(w: Workspace, script: str = "train") -> list[str]:
    """A decoder whose tokenizer has no token that ends a text."""
    command = _decoder(w, script=script)
    _set(w.folder / "decoder" / "tokenizer_config.json", eos_token=None)
    return command


def _without_padding(w: Workspace) -> list[str]:
    """An encoder whose tokenizer has no padding token. BERT's own class would make one up."""
    w.set_tokenizer(pad_token=None, tokenizer_class="PreTrainedTokenizerFast")
    return w.train()


def _of_type(model_type: str, *says: str, script: str = "train") -> Case:
    """A teacher of an architecture that is known and has no axes here."""

    def build(w: Workspace) -> list[str]:
        (w.teacher / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 101}))
        return w.train(*(["--device", "H100"] if script == "plan" else []), script=script)

    name = f"teacher_is_a_{model_type}_{script}".replace("-", "_")
    says = (f"teacher.name: architecture '{model_type}' cannot be cut", *says)
    return Case(name, build, says=says, ranks=2 if script == "train" else 1)


def _groups(name: str, *overrides: str, says: tuple[str, ...]) -> Case:
    return Case(f"groups_{name}", lambda w: _decoder(w, *overrides), says=says)


def _with_scaled_positions(w: Workspace) -> list[str]:
    """A decoder whose angles are not the default ones."""
    command = _decoder(w, "student.head_dim=4")
    scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    _set(w.folder / "decoder" / "config.json", rope_parameters=scaled)
    return command


def _fine_tuned(script: str) -> Case:
    """A decoder where an encoder is fine-tuned."""

    def build(w: Workspace) -> list[str]:
        _decoder(w)
        data = w.folder / "data"
        (data / "RTE").mkdir(parents=True)
        rows = "index\tsentence1\tsentence2\tlabel\n" + "".join(f"{i}\ta b\tc d\tentailment\n" for i in range(4))
        question = {"id": "q", "question": "who", "answers": [{"text": "fox", "answer_start": 4}]}
        squad = {"version": "1.1", "data": [{"paragraphs": [{"context": "the fox jumps", "qas": [question]}]}]}
        for split in ("train", "dev"):
            (data / "RTE" / f"{split}.tsv").write_text(rows)
            (data / f"{split}-v1.1.json").write_text(json.dumps(squad))
        tasks = ["--tasks", "rte"] if script == "glue" else []
        given = ["--checkpoint", str(w.folder / "decoder"), "--data", str(data), "--max-length", "32", *tasks]
        return [script, *given, "--device", "cpu", "--out", str(w.folder / "out"), "--cache-dir", str(w.cache)]

    says = ("--checkpoint", "is a llama, a causal language model", "homodistil lm-eval")
    return Case(f"{script}_of_a_decoder", build, says=says, ranks=1)


def _none(override: str, *says: str) -> Case:
    """An encoder that is to predict nothing, and something that needs its head."""
    field, _, value = override.partition("=")
    unset = [f"{name}=0" for name in ("loss.mlm", "loss.kl", "teacher.correction_steps") if name != field]
    name = f"no_words_with_{field.partition('.')[2]}_{value}"
    return Case(name, lambda w: w.train("data.task=none", *unset, override), says=says)


TASKS = [
    Case(
        "decoder_with_masks",
        lambda w: _decoder(w, "data.task=mlm"),
        says=["data.task: found mlm", "is a causal language model", "data.task=causal"],
    ),
    Case(
        "decoder_with_masks_in_a_plan",
        lambda w: _decoder(w, "data.task=mlm", script="plan"),
        says=["data.task: found mlm"],
        ranks=1,
    ),
    Case(
        "decoder_with_masks_to_prepare_with",
        lambda w: _decoder(w, "data.task=mlm", script="prepare_data"),
        says=["data.task: found mlm"],
        ranks=1,
    ),
    Case(
        "encoder_for_the_next_token",
        lambda w: w.train("data.task=causal"),
        says=["data.task: found causal", "is a masked language model", "data.task=mlm"],
    ),
    Case("decoder_without_an_end", _without_end, says=["has no eos_token", "a causal language model"]),
    Case("encoder_without_padding", _without_padding, says=["has no pad_token", "a masked language model"]),
    _fine_tuned("glue"),
    _fine_tuned("squad"),
]

WITHOUT_WORDS = [
    Case(
        "decoder_without_words",
        lambda w: _decoder(w, "data.task=none", "loss.kl=0"),
        says=["data.task: found none", "is a causal language model", "data.task=causal"],
    ),
    _none("loss.mlm=1", "loss.mlm: found 1", "data.task=none uses no language-modelling head"),
    _none("teacher.correction_steps=3", "teacher.correction_steps: found 3", "allowed is 0"),
]

SHAPES = [
    _groups("none", "student.num_key_value_heads=0", says=("student.num_key_value_heads: found 0", "3 groups of 2")),
    _groups("negative", "student.num_key_value_heads=-1", says=("student.num_key_value_heads: found -1",)),
    _groups("too_many", "student.num_key_value_heads=6", says=("student.num_key_value_heads: found 6", "3 groups")),
    _groups("of_other_heads", "student.num_key_value_heads=3", says=("found 3 (with num_attention_heads 4)", "3, 6")),
    _groups("of_five_heads", "student.num_attention_heads=5", says=("student.num_attention_heads: found 5", "4, 6")),
    _groups("of_half_a_pair", "student.head_dim=5", says=("student.head_dim: found 5", "even", "teacher's 8")),
    Case("head_dim_of_other_angles", _with_scaled_positions, says=["student.head_dim: found 4", "rope_type default"]),
    Case(
        "head_dim_of_an_encoder",
        lambda w: w.train("student.head_dim=4"),
        says=["student.head_dim: found 4", "bert", "leave it out"],
    ),
    Case(
        "head_dim_beside_a_size",
        lambda w: _decoder(w, "student.hidden_size=null", "student.num_attention_heads=null", *_SIZE_AND_HEADS),
        says=["student.size: found 0.5 beside student.head_dim"],
    ),
    Case(
        "groups_of_an_encoder",
        lambda w: w.train("student.num_key_value_heads=2"),
        says=["student.num_key_value_heads: found 2", "leave it out"],
    ),
    Case(
        "size_of_next_to_nothing",
        lambda w: w.train(
            *(f"student.{name}=null" for name in ("hidden_size", "intermediate_size", "num_attention_heads")),
            "student.size=0.01",
        ),
        says=["student.size: ", "parameters are wanted", "set a size between"],
    ),
]

REFUSED = [
    _of_type("deberta-v2", "relative positions", "give a BERT"),
    _of_type("mixtral", "experts", "give a dense model", script="plan"),
    _of_type("mamba", "state-space", "give a Transformer", script="prepare_data"),
]

CASES = TASKS + WITHOUT_WORDS + SHAPES + REFUSED
