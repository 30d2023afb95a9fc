"""A decoder with grouped heads through the launcher's own script: compensated events on a live engine, resume, stock
export."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support import launched_run
from support.launched_run import arguments
from support.tiny_decoder import write_decoder, write_text
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
    pipeline,
)

STUDENT = {"hidden_size": 36, "intermediate_size": 48, "num_attention_heads": 4}
_FULL = "pruning.compensation=full"
_PAIR_BY_PAIR = (_FULL, "pruning.max_event_fraction=0.3")


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """`teacher` and `text`."""
    folder = tmp_path_factory.mktemp("decoder")
    return _write_materials(folder, LlamaConfig)


def _write_materials(folder: Path, kind: type[PretrainedConfig]) -> Path:
    write_decoder(folder / "teacher", kind, write_text(folder / "text"))
    return folder


@pytest.fixture(scope="module")
def runs(server, materials) -> dict[int, Path]:
    """ZeRO stage -> finished run folder."""
    for stage in (2, 3):
        output = launched_run.run(server, arguments(materials, materials / f"run{stage}", stage, STUDENT, _FULL))
        (materials / f"zero{stage}.txt").write_text(output)
    return {stage: materials / f"run{stage}" for stage in (2, 3)}


@pytest.mark.parametrize("stage", [2, 3])
def test_groups_and_heads_in_them_fall_in_events(runs, stage):
    events = launched_run.lines(runs[stage] / "events.jsonl")
    assert len(events) >= 3 and all(0 < event["variance_lost"] < 1 for event in events)
    last = events[-1]["widths_after"]
    assert (last["layer.0.kv_heads"], last["layer.0.heads_in_group"], last["layer.1.qk_dim"]) == (2, 2, 8)
    assert (last["hidden"], last["layer.1.ffn"]) == (36, 48)


def test_stages_agree_and_the_start_is_the_teacher(runs):
    launched_run.check_stages_agree(runs[2], runs[3])


def test_the_table_has_the_numbers_of_its_task(runs, materials):
    teacher, student = json.loads((runs[2] / "result.json").read_text())
    for row in (teacher, student):
        assert row["perplexity"] == pytest.approx(math.exp(row["heldout_lm_loss"]))
        assert 0 < row["bits_per_byte"] < 8 and "masked_top1" not in row and "heldout_mlm_loss" not in row
    assert teacher["kl_to_teacher"] == 0 and student["kl_to_teacher"] > 0
    output = (materials / "zero2.txt").read_text()
    assert "bits per byte" in output and "masked" not in output
    assert "losses: lm x 1" in output and "lm " in output.partition("the loss is ")[2].splitlines()[0]
    assert "mlm" not in output.lower()


def _heldout_ids(materials: Path) -> torch.Tensor:
    (path,) = materials.glob("cache/corpora/*/heldout.npy")
    return torch.from_numpy(np.load(path).astype(np.int64))


def _stock_loss(folder: Path, ids: torch.Tensor) -> float:
    """The stock model's own shifted loss."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids, labels=ids).loss.item()


def test_the_teachers_loss_is_the_librarys(runs, materials):
    """On the held-out blocks, by the stock model's own shifted loss, and its bytes by decoding."""
    ids = _heldout_ids(materials)
    loss = _stock_loss(materials / "teacher", ids)
    tokenizer = AutoTokenizer.from_pretrained(materials / "teacher")
    row = json.loads((runs[2] / "result.json").read_text())[0]
    assert row["heldout_lm_loss"] == pytest.approx(loss, rel=1e-5)
    text = [tokenizer.decode(row[1:], skip_special_tokens=True) for row in ids]
    num_bytes = sum(len(t.encode()) for t in text)
    assert row["bits_per_byte"] == pytest.approx(loss * ids[:, 1:].numel() / math.log(2) / num_bytes, rel=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_resume_is_bitwise(server, runs, materials, tmp_path, stage):
    copy = launched_run.without_end(runs[stage], tmp_path / "run")
    launched_run.run(server, arguments(materials, copy, stage, STUDENT, _FULL, "run.resume=auto"))
    assert launched_run.same_export(copy, runs[stage])


def test_the_export_generates_without_our_code(runs):
    model = AutoModelForCausalLM.from_pretrained(runs[2] / "export")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (4, 2, 8)
    text = pipeline("text-generation", model=str(runs[2] / "export"))("the cat", max_new_tokens=4)
    assert text[0]["generated_text"].startswith("the cat")
    card = (runs[2] / "export" / "README.md").read_text()
    assert "text-generation" in card and "AutoModelForCausalLM" in card and "perplexity" in card


@pytest.mark.parametrize(("kind", "heads"), [(GPT2Config, 6), (Gemma3TextConfig, 4)], ids=["gpt2", "gemma3_text"])
def test_the_export_of_another_family_is_its_student(server, tmp_path, kind, heads):
    """Events on a live engine, then the student's held-out loss by the library alone."""
    materials = _write_materials(tmp_path, kind)
    student = STUDENT | {"num_attention_heads": heads}
    few = (_FULL, f"train.save_every_steps={launched_run.STEPS}", "run.keep_checkpoints=1")
    launched_run.run(server, arguments(materials, materials / "run", 2, student, *few))
    events = launched_run.lines(materials / "run" / "events.jsonl")
    assert len(events) >= 3 and events[-1]["widths_after"]["hidden"] == 36
    first = next(line for line in launched_run.lines(materials / "run" / "metrics.jsonl") if "loss/total" in line)
    assert first["loss/kl"] == first["loss/attention"] == first["loss/hidden"] == first["loss/embedding"] == 0
    row = json.loads((materials / "run" / "result.json").read_text())[1]
    assert row["heldout_lm_loss"] == pytest.approx(_stock_loss(materials / "run" / "export", _heldout_ids(materials)))
    text = pipeline("text-generation", model=str(materials / "run" / "export"))("the cat", max_new_tokens=4)
    assert text[0]["generated_text"].startswith("the cat")


def test_heads_get_narrower_by_pairs(server, tmp_path):
    """Rotary pairs fall in events, norms of heads with them; the way there resumes bitwise; the export is a stock one
    with another theta."""
    materials, student = _write_materials(tmp_path, Qwen3Config), STUDENT | {"head_dim": 4}
    launched_run.run(server, arguments(materials, materials / "run", 2, student, *_PAIR_BY_PAIR))
    events = [e for e in launched_run.lines(materials / "run" / "events.jsonl") if "head_norm" in e["changed"]]
    widths = [event["widths_after"] for event in events]
    assert len(launched_run.lines(materials / "run" / "events.jsonl")) >= 3
    assert [of["head_norm"] for of in widths] == [6, 4]
    assert all(of["layer.0.qk_dim"] == of["layer.1.vo_dim"] == of["head_norm"] for of in widths)
    copy = launched_run.without_end(materials / "run", tmp_path / "resumed")
    launched_run.run(server, arguments(materials, copy, 2, student, *_PAIR_BY_PAIR, "run.resume=auto"))
    assert launched_run.same_export(copy, materials / "run")
    row = json.loads((materials / "run" / "result.json").read_text())[1]
    assert row["heldout_lm_loss"] == pytest.approx(_stock_loss(materials / "run" / "export", _heldout_ids(materials)))
    model = AutoModelForCausalLM.from_pretrained(materials / "run" / "export")
    assert model.config.head_dim == 4 and model.model.layers[0].self_attn.q_norm.weight.shape == (4,)
    text = pipeline("text-generation", model=str(materials / "run" / "export"))("the cat", max_new_tokens=4)
    assert text[0]["generated_text"].startswith("the cat")
