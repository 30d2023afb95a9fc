"""Which teachers are refused, and that a run, its check, its plan and the preparation of text agree; what is let in."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from families.cases import make_model
from safetensors.torch import load_file, save_file
from support.small import small_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
)

from homodistil.config.schema import RunConfig
from homodistil.distill.teacher import check_stored, has_lm_head, load_config, load_model, load_tokenizer
from homodistil.errors import UserError
from homodistil.evaluation.glue.checkpoint import load_encoder
from homodistil.preflight.findings import Findings
from homodistil.preflight.settings import check_model
from homodistil.training.teacher_checks import check_plannable, check_teacher
from homodistil.training.teacher_facts import teacher_facts

QUERY = "bert.encoder.layer.1.attention.self.query.weight"
HEAD = "cls.predictions."


@pytest.fixture
def teacher(tmp_path) -> Path:
    folder = tmp_path / "teacher"
    small_model().save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(folder)
    return folder


def config_of(teacher: Path, **fields: object) -> RunConfig:
    config = RunConfig()
    config.teacher.name = str(teacher)
    config.student.hidden_size, config.student.intermediate_size, config.student.num_attention_heads = 12, 20, 4
    config.data.seq_len, config.pruning.max_event_fraction = 16, 1.0
    for name, value in fields.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    return config


def edit(teacher: Path, change) -> None:
    tensors = load_file(teacher / "model.safetensors")
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, teacher / "model.safetensors", {"format": "pt"})


def set_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(action) -> str:
    with pytest.raises(UserError) as refused:
        action()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def start(config: RunConfig) -> None:
    """What a run does before its corpus is prepared."""
    folder = check_teacher(config)
    load_tokenizer(folder, load_config(folder))


def nan(tensors: dict) -> None:
    tensors[QUERY][3, 5] = float("nan")


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: edit(t, nan),
        lambda t: edit(t, lambda tensors: {n: x for n, x in tensors.items() if n != QUERY}),
        lambda t: edit(t, lambda tensors: {n: x.to(torch.int8) for n, x in tensors.items()}),
        lambda t: edit(t, lambda tensors: {n: x for n, x in tensors.items() if n != f"{HEAD}bias"}),
        lambda t: (t / "model.safetensors").write_bytes(b"\xff" * 999),
        lambda t: set_json(t / "config.json", num_hidden_layers=10**6),
        lambda t: set_json(t / "config.json", hidden_size=48, num_attention_heads=4),
        lambda t: set_json(t / "config.json", is_decoder=True),
        lambda t: set_json(t / "config.json", position_embedding_type="relative_key_query"),
        lambda t: set_json(t / "tokenizer_config.json", mask_token="[PAD]"),
        lambda t: set_json(t / "tokenizer_config.json", mask_token=None),
        lambda t: (t / "tokenizer.json").unlink(),
        lambda t: (t / "config.json").unlink(),
    ],
)
def test_a_run_its_check_and_its_plan_refuse_the_same_in_the_same_words(teacher, damage):
    config = config_of(teacher)
    start(config)
    check_plannable(config)
    damage(teacher)
    said = refusal(lambda: start(config))
    assert refusal(lambda: check_plannable(config)) == said
    findings = Findings()
    assert check_model(findings, functools.partial(teacher_facts, config)) is None
    (bad,) = [finding for finding in findings if not finding.is_good]
    assert f"{bad.found}; {bad.fix}" == said


def test_a_plan_is_made_of_a_config_alone(teacher):
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (teacher / name).unlink()
    check_plannable(config_of(teacher))
    assert "data.seq_len: 65 is above" in refusal(lambda: check_plannable(config_of(teacher, data__seq_len=65)))
    set_json(teacher / "config.json", add_cross_attention=True)
    assert "add_cross_attention" in refusal(lambda: check_plannable(config_of(teacher)))


def test_a_missing_head_is_named_once_where_it_need_not_be_there(teacher):
    edit(teacher, lambda tensors: {n: x for n, x in tensors.items() if not n.startswith(HEAD)})
    said: list[str] = []
    check_teacher(config_of(teacher, teacher__correction_steps=7), said.append)
    assert said == [f"teacher: {teacher} has no MLM head; teacher.correction_steps=7 trains one"]
    unused = {"data__task": "mlm", "loss__mlm": 0.0, "loss__kl": 0.0, "pruning__compensation": "none"}
    check_teacher(config_of(teacher, **unused), said.append)
    assert said[1:] == [f"teacher: {teacher} has no MLM head, and none is used (loss.mlm=0, loss.kl=0)"]
    for mode in ("full", "project"):
        config = config_of(teacher, **unused | {"pruning__compensation": mode})
        said = refusal(lambda config=config: check_teacher(config))
        assert f"found {mode}" in said and "set pruning.compensation=refit or none" in said
    check_teacher(config_of(teacher, **unused | {"pruning__compensation": "refit"}))
    check_teacher(config_of(teacher, teacher__correction_steps=7, pruning__compensation="full"))
    labels = config_of(teacher, **unused, pruning__importance="teacher_kl")
    assert "pruning.importance: found teacher_kl" in refusal(lambda: check_teacher(labels))


def test_half_a_head_is_refused_though_one_would_be_trained(teacher):
    edit(teacher, lambda tensors: {n: x for n, x in tensors.items() if n != f"{HEAD}transform.dense.bias"})
    said = refusal(lambda: check_teacher(config_of(teacher, teacher__correction_steps=7)))
    assert "a part of the MLM head" in said and "cls.predictions.transform.dense.bias" in said


def test_extra_tensors_are_one_line_and_those_of_pretraining_none(teacher):
    said: list[str] = []
    usual = {"bert.pooler.dense.weight": torch.zeros(24, 24), "cls.seq_relationship.bias": torch.zeros(2)}
    usual |= {"bert.embeddings.position_ids": torch.arange(16)[None]}
    edit(teacher, lambda tensors: tensors | usual)
    assert check_teacher(config_of(teacher), said.append) and said == []
    edit(teacher, lambda tensors: tensors | {"classifier.bias": torch.zeros(2)})
    set_json(teacher / "config.json", num_hidden_layers=2)
    check_teacher(config_of(teacher), said.append)
    (line,) = said
    assert "(17): bert.encoder.layer.2." in line and "and 14 more" in line


def test_every_way_to_store_the_same_weights_is_taken(teacher):
    before = load_model(str(teacher)).state_dict()

    def same() -> bool:
        check_stored(str(teacher), load_config(str(teacher)))
        assert has_lm_head(str(teacher))
        return all(torch.equal(tensor, before[name]) for name, tensor in load_model(str(teacher)).state_dict().items())

    # A bias that is tied under its other name; double precision; shards with an index.
    edit(teacher, lambda t: {n.replace(f"{HEAD}bias", f"{HEAD}decoder.bias"): x.double() for n, x in t.items()})
    assert same()
    (teacher / "model.safetensors").unlink()
    small_model().save_pretrained(teacher, max_shard_size="20KB")
    assert len(list(teacher.glob("*.safetensors"))) > 1 and same()


def test_a_tokenizer_of_another_kind_is_taken_where_its_class_says_so(teacher):
    """Some BERTs have SentencePiece tokenizers."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123))]
    unigram = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=1, byte_fallback=False))
    unigram.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=unigram, mask_token="[MASK]", **special).save_pretrained(teacher)
    assert load_tokenizer(str(teacher), load_config(str(teacher))).tokenize("ab") == ["a", "b"]
    set_json(teacher / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    assert "tokenizer.json holds a Unigram model" in refusal(
        lambda: load_tokenizer(str(teacher), load_config(str(teacher)))
    )


def test_an_encoder_of_another_family_is_evaluated_and_looked_at_as_well(tmp_path):
    config = DistilBertConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=16)
    DistilBertModel(config).save_pretrained(tmp_path)
    load_encoder(AutoModelForSequenceClassification, str(tmp_path), num_labels=2)
    name = "transformer.layer.1.ffn.lin1.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({n: x for n, x in tensors.items() if n != name}, tmp_path / "model.safetensors", {"format": "pt"})
    load = lambda: load_encoder(AutoModelForSequenceClassification, str(tmp_path), num_labels=2)  # noqa: E731
    assert f"lack 1 tensor that config.json asks for (distilbert.{name})" in refusal(load)
    save_file(tensors | {name: tensors[name] * torch.inf}, tmp_path / "model.safetensors", {"format": "pt"})
    assert f"distilbert.{name} holds" in refusal(load)


def test_the_first_gpt2_files_are_read(tmp_path):
    """Of the backbone alone, with the causal masks as whole numbers."""
    model = make_model("gpt2")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored = {name.removeprefix("transformer."): t for name, t in stored.items() if name != "lm_head.weight"}
    stored |= {f"h.{i}.attn.bias": torch.ones(1, 1, 40, 40, dtype=torch.uint8).tril() for i in range(2)}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    said = []
    assert has_lm_head(str(tmp_path), say=said.append) and not said
    loaded = load_model(str(tmp_path)).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())
