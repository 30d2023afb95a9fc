"""A family from one run on two real ranks: stock checkpoints at exact widths, records, controls; kills and resumes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.small_job import SAVE_EVERY, STEPS, TRAIN, arguments, differences, result
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM

from homodistil.distributed.exit_codes import STOPPED, USER_ERROR
from homodistil.export.model_card import METRICS

# 24 wide, 4 heads of 6: a milestone of 20 (heads of 5), one of 16 (4), and the final 12 (3).
FAMILY = ("run.export_milestones=[0.8,0.66,0.5]", "run.settle_steps=2", "run.compare=[one_shot]")
NAMES = ("milestone-0.8", "milestone-0.66", "milestone-0.5")
MEASURED = ("inference_latency_ms", "inference_tokens_per_s", "tokens_per_s_training")


@pytest.fixture(scope="module")
def family(server, run_inputs, tmp_path_factory):
    """A finished run, never stopped."""
    folder = tmp_path_factory.mktemp("family") / "run"
    job = server.start(TRAIN, arguments(run_inputs, folder, *FAMILY))
    assert job.wait(timeout_s=300) == [0, 0], job.output()
    return folder


def _records(folder) -> list[dict]:
    return json.loads((folder / "family.json").read_text())


def _lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _weights(folder) -> dict:
    files = {name: load_file(folder / "export" / name / "model.safetensors") for name in NAMES}
    return {(name, key): tensor for name, tensors in files.items() for key, tensor in tensors.items()}


def test_records_say_what_each_member_is(family):
    records = _records(family)
    assert [r["milestone"] for r in records] == [0.8, 0.66, 0.5] and [r["hidden_size"] for r in records] == [20, 16, 12]
    assert [r["num_attention_heads"] for r in records] == [4, 4, 4]
    assert [r["intermediate_size"] for r in records] == [33, 27, 20]  # 40 .. 20, as far as 24 .. 12
    assert records[-1]["step"] == STEPS and [r["step"] for r in records] == sorted(r["step"] for r in records)
    teacher = json.loads((family / "result.json").read_text())[0]
    for record in records:
        assert record["training_tokens"] == record["step"] * 8 * 16
        assert record["inference_latency_ms"] > 0 and record["inference_tokens_per_s"] > 0
        weights = (family / record["folder"] / "model.safetensors").stat()
        assert record["weights_bytes"] == weights.st_size
        card = (family / record["folder"] / "README.md").read_text()
        losses = f"| {record['heldout_mlm_loss']:.4f} | {teacher['heldout_mlm_loss']:.4f} |"
        assert f"| {METRICS['heldout_mlm_loss'].label} {losses}" in card and "inference_latency_ms" in card
        assert str(family.parent) not in card and "teacher.name=TEACHER" in card


def test_widths_are_held_before_each_export(family):
    events = {event["step"]: event["widths_after"]["hidden"] for event in _lines(family / "events.jsonl")}
    for record in _records(family)[:-1]:
        arrival = next(step for step, hidden in events.items() if hidden == record["hidden_size"])
        assert record["step"] == arrival + 2
        assert not any(arrival < step <= record["step"] for step in events)


def test_stock_code_loads_each_member_and_finds_its_scores(family, run_inputs):
    """In a process that has no homodistil: tests/unit/export/test_export.py."""
    for name, record in zip(NAMES, _records(family), strict=True):
        folder = family / "export" / name
        model, _ = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        config = model.config
        assert type(model) is BertForMaskedLM
        assert config.hidden_size == record["hidden_size"] and config.num_attention_heads == 4
        assert config.intermediate_size == record["intermediate_size"]
        assert sum(p.numel() for p in model.parameters()) == record["parameters"]  # nothing is padded
        assert _heldout_loss(model, run_inputs) == pytest.approx(record["heldout_mlm_loss"], abs=1e-5)


def _heldout_loss(model, run_inputs) -> float:
    """Of a stock model, over the same held-out text and masks, by torch's own cross-entropy."""
    from homodistil.config.command_line import parse
    from homodistil.training.inputs import prepare_inputs

    own = arguments(run_inputs, run_inputs / "unused")
    del own[own.index("--deepspeed") : own.index("--deepspeed") + 2]
    config = parse(own)
    found, count = 0.0, 0
    for batch in prepare_inputs(config, torch.device("cpu")).heldout(config):
        with torch.no_grad():
            logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
        rows = logits[batch.target_index]
        found += float(torch.nn.functional.cross_entropy(rows, batch.target_ids, reduction="sum"))
        count += len(rows)
    return found / count


def test_controls_have_the_members_shape_and_steps(family):
    rows = {row["name"]: row for row in json.loads((family / "result.json").read_text())}
    members = [f"homodistil @ {m}" for m in ("0.8", "0.66")] + ["homodistil"]
    single = ["one_shot"]
    for m in ("0.8", "0.66"):
        single += [f"one_shot @ {m}", f"one_shot @ {m}, the run's rates"]
    assert list(rows) == ["teacher", *members, *single]
    for record in _records(family)[:-1]:
        m = f"{record['milestone']:g}"
        for label, folder in (("", ""), (", the run's rates", "-same-rates")):
            row = rows[f"one_shot @ {m}{label}"]
            assert row["parameters"] == record["parameters"] and row["hidden_size"] == record["hidden_size"]
            assert row["step"] == record["step"] and row["milestone"] == record["milestone"]
            train = _train_lines(family / "compare" / f"one_shot-{m}{folder}")
            assert train[-1]["step"] == record["step"]
            run_rates = [line["optim/lr"] for line in _train_lines(family)][: record["step"]]
            ours = [line["optim/lr"] for line in train]
            assert (ours == run_rates) == bool(label), (label, ours, run_rates)
    assert rows["homodistil"]["milestone"] == rows["one_shot"]["milestone"] == 0.5


def _train_lines(folder) -> list[dict]:
    return [line for line in _lines(folder / "metrics.jsonl") if line["kind"] == "train"]


def _without_measured(record: dict) -> dict:
    return {name: value for name, value in record.items() if name not in MEASURED}


def _assert_same_family(ours, theirs) -> None:
    assert differences(_weights(ours), _weights(theirs)) == []
    assert [_without_measured(r) for r in _records(ours)] == [_without_measured(r) for r in _records(theirs)]


ALONE = FAMILY[:2]
"""Without controls, which are runs of their own."""


def test_killed_between_export_and_record_and_stopped_while_settling(server, run_inputs, family, tmp_path):
    folder = tmp_path / "run"
    own = arguments(run_inputs, folder, *ALONE, "run.resume=auto")
    first, second = (record["step"] for record in _records(family)[:2])
    job = server.start(TRAIN, own, env={"HOMODISTIL_FAULT": "family.exported:action=kill"})
    assert job.wait(timeout_s=180) == [-9, -9], job.output()
    assert (folder / "export" / NAMES[0] / "config.json").is_file() and not (folder / "family.json").exists()
    last_saved = (first - 1) // SAVE_EVERY * SAVE_EVERY
    # Asked in the step of the second milestone's event, stopped one later: held, with one step to go.
    asked = f"train.step:rank=1:hit={second - 2 - last_saved}:action=term"
    job = server.start(TRAIN, own, env={"HOMODISTIL_FAULT": asked})
    assert job.wait(timeout_s=180) == [STOPPED, STOPPED], job.output()
    assert (folder / "checkpoints" / "latest").read_text().strip() == f"step-{second - 1:06d}"
    assert [r["milestone"] for r in _records(folder)] == [0.8]
    before = (folder / "export" / NAMES[0] / "model.safetensors").stat()
    job = server.start(TRAIN, own)
    assert job.wait(timeout_s=180) == [0, 0], job.output()
    after = (folder / "export" / NAMES[0] / "model.safetensors").stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino), "exported twice"
    _assert_same_family(folder, family)
    ours, theirs = ({k: v for k, v in result(path).items() if k != "result.json"} for path in (folder, family))
    assert differences(ours, {k: v for k, v in theirs.items() if "compare" not in str(k)}) == []


def test_milestones_of_a_run_stay_what_they_are_when_it_is_gone_on_with(server, run_inputs, family):
    own = arguments(run_inputs, family, "run.export_milestones=[0.8]", "run.resume=auto")
    job = server.start(TRAIN, own)
    assert job.wait(timeout_s=180) == [USER_ERROR] * 2
    assert "run.export_milestones: the run in" in job.output() and "[0.8, 0.66, 0.5], this config [0.8]" in job.output()
