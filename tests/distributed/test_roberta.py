"""RoBERTa's class with BERT's trained weights: the run is the one of BERT itself, whatever the names and positions.

A zero row in front of BERT's position table makes RoBERTa's first position (pad_token_id + 1) BERT's position 0, so
both classes compute the same function: two implementations of a family that must agree in every logged number.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.fork_server import ROOT, ForkServer
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    CamembertConfig,
    RobertaConfig,
    RobertaForMaskedLM,
    XLMRobertaConfig,
)

from homodistil.data.sources.assets import teacher_folder
from homodistil.models import family_of
from homodistil.models.encoders.roberta import ROBERTA

TRAIN = ROOT / "launcher" / "train.py"
STEPS, SAVE_EVERY = 8, 3
_OF_BERT = {
    "bert.": "roberta.",
    "cls.predictions.transform.dense.": "lm_head.dense.",
    "cls.predictions.transform.LayerNorm.": "lm_head.layer_norm.",
    "cls.predictions.bias": "lm_head.bias",
    "cls.predictions.decoder.": "lm_head.decoder.",
}


def transplant(bert: BertForMaskedLM) -> RobertaForMaskedLM:
    """The same function in RoBERTa's class."""
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "hidden_act")
    kept += ("type_vocab_size", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob")
    config = RobertaConfig(
        **{name: getattr(bert.config, name) for name in kept},
        pad_token_id=0,
        max_position_embeddings=bert.config.max_position_embeddings + 1,
    )
    weights = {}
    for name, tensor in bert.state_dict().items():
        old, new = next(pair for pair in _OF_BERT.items() if name.startswith(pair[0]))
        weights[new + name.removeprefix(old)] = tensor
    table = "roberta.embeddings.position_embeddings.weight"
    weights[table] = torch.cat([torch.zeros(1, config.hidden_size), weights[table]])
    model = RobertaForMaskedLM(config)
    model.load_state_dict(weights, strict=False)
    return model.eval()


@pytest.fixture(scope="module")
def teachers(cache_dir, tmp_path_factory) -> dict[str, Path]:
    """model_type -> folder of the packaged BERT-tiny in that class."""
    packaged, folder = teacher_folder("embedded:bert-tiny", cache_dir), tmp_path_factory.mktemp("roberta")
    bert, tokenizer = BertForMaskedLM.from_pretrained(packaged), AutoTokenizer.from_pretrained(packaged)
    for name, model in {"bert": bert, "roberta": transplant(bert)}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {"bert": folder / "bert", "roberta": folder / "roberta"}


def test_other_models_of_the_class_go_by_name():
    for config in (RobertaConfig(), XLMRobertaConfig(), CamembertConfig()):
        assert family_of(config.model_type) is ROBERTA


def test_fewer_tokens_than_positions():
    assert ROBERTA.shape(RobertaConfig(max_position_embeddings=514)).max_tokens == 512
    model = ROBERTA.empty_model(
        RobertaConfig(
            max_position_embeddings=14, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9
        )
    )
    model(torch.full((1, 12), 5))
    with pytest.raises((IndexError, RuntimeError), match="out of bounds|out of range"):
        model(torch.full((1, 13), 5))


def test_parts_compute_what_the_model_does(teachers):
    model = RobertaForMaskedLM.from_pretrained(teachers["roberta"]).eval()
    ids = torch.randint(5, 1000, (3, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        last = ROBERTA.backbone(model)(input_ids=ids).last_hidden_state
        rows = ROBERTA.lm_transform(model)(last.flatten(0, 1))
        logits = ROBERTA.decoder(model)(rows).view(3, 11, -1)
        assert torch.equal(logits, model(ids).logits)
    named = {name for name, _ in model.named_parameters()}
    assert {use.parameter for use in ROBERTA.axis_table(model).uses} | {"lm_head.bias"} == named


def _arguments(folder: Path, teacher: Path, cache_dir: Path, *overrides: str) -> list[str]:
    fields = {
        "teacher.name": teacher,
        "teacher.correction_steps": 0,
        "student.preset": "quickstart",
        "data.cache_dir": cache_dir,
        "data.sources": "[embedded:wikipedia]",
        "data.seq_len": 32,
        "data.heldout_fraction": 0.003,
        "train.steps": STEPS,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 2,
        "train.save_every_steps": SAVE_EVERY,
        "train.log_every_steps": 1,
        "train.eval_batch_size": 256,
        "pruning.compensation": "full",
        "pruning.end_fraction": 0.8,
        "pruning.interval_steps": 3,
        "pruning.compensation_sequences": 32,
        "run.dir": folder,
        "run.compare": "[]",
        "run.report": "false",
        "run.keep_checkpoints": 9,
    }
    values = [f"{name}={value}" for name, value in fields.items()]
    return ["--deepspeed", str(ROOT / "ds_configs" / "zero2_fp32.json"), "recipe=quickstart", *values, *overrides]


def _run(server: ForkServer, arguments: list[str]) -> None:
    job = server.start(TRAIN, arguments)
    assert job.wait(timeout_s=300) == [0, 0], job.output()


@pytest.fixture(scope="module")
def runs(server, teachers, cache_dir, tmp_path_factory) -> dict[str, Path]:
    """model_type -> finished run folder."""
    folder = tmp_path_factory.mktemp("runs")
    for name, teacher in teachers.items():
        _run(server, _arguments(folder / name, teacher, cache_dir))
    return {name: folder / name for name in teachers}


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_is_the_one_of_bert(runs):
    ours, theirs = (_lines(runs[name] / "metrics.jsonl") for name in ("roberta", "bert"))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    compared = [(a, b, name) for a, b in zip(ours, theirs, strict=True) for name in b if name.startswith("loss/")]
    assert len(compared) > 5 * STEPS
    for a, b, name in compared:
        # Before the first event the same up to the order of fp32 sums. Compensation solves with what Adam has moved,
        # and the position tables differ by a row whose moments are 0: 1 % was seen between layouts of one model.
        assert a[name] == pytest.approx(b[name], rel=1e-4 if b["step"] < 3 else 0.02), (b["step"], name)
    ours, theirs = ([line["widths_after"] for line in _lines(runs[n] / "events.jsonl")] for n in ("roberta", "bert"))
    assert ours == theirs and len(ours) >= 2


def test_the_export_is_stock(runs):
    model = RobertaForMaskedLM.from_pretrained(runs["roberta"] / "export").eval()
    assert model.config.hidden_size == 64 and model.config.model_type == "roberta"
    text = AutoTokenizer.from_pretrained(runs["roberta"] / "export")("A small [MASK].", return_tensors="pt")
    assert torch.isfinite(model(**text).logits).all()
    card = (runs["roberta"] / "export" / "README.md").read_text()
    assert "roberta" in card and "fill-mask" in card


def test_resume_is_bitwise(server, runs, teachers, cache_dir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(runs["roberta"], copy)
    for leftover in (f"checkpoints/step-{STEPS:06d}", f"checkpoints/step-{2 * SAVE_EVERY:06d}", "export"):
        shutil.rmtree(copy / leftover)
    (copy / "row.json").unlink()
    (copy / "checkpoints" / "latest").write_text(f"step-{SAVE_EVERY:06d}\n")
    _run(server, _arguments(copy, teachers["roberta"], cache_dir, "run.resume=auto"))
    ours, theirs = (load_file(path / "export" / "model.safetensors") for path in (copy, runs["roberta"]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
