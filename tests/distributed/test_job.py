"""The main job on two real ranks, with the real packaged teacher and text: files, resume, stops, exit codes."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.fork_server import ForkServer
from support.launch import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, BertForMaskedLM

from homodistil.metrics.tensorboard_layout import board_values

TRAIN = ROOT / "launcher" / "train.py"
STEPS, SAVE_EVERY = 14, 5


def _arguments(run_dir: Path, cache_dir: Path, *overrides: str) -> list[str]:
    fields = {
        "data.cache_dir": cache_dir,
        "data.sources": "[embedded:wikipedia]",
        "data.seq_len": 32,
        "teacher.correction_steps": 0,
        "train.steps": STEPS,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 2,
        "train.lr": 1e-3,
        "train.decay_fraction": 0.5,
        "train.uncut_lr_share": 0.5,
        "train.save_every_steps": SAVE_EVERY,
        "train.eval_every_steps": 0,
        "train.log_every_steps": 1,
        "run.keep_checkpoints": 9,
        "train.eval_batch_size": 256,
        "pruning.end_fraction": 0.8,
        "pruning.interval_steps": 2,
        "pruning.compensation_sequences": 64,
        "data.heldout_fraction": 0.003,
        "run.dir": run_dir,
        "run.compare": "[]",
        "run.report": "false",
    }
    fields = [f"{name}={value}" for name, value in fields.items()]
    return ["--deepspeed", str(ROOT / "ds_configs" / "zero2_fp32.json"), *fields, *overrides]


@pytest.fixture(scope="module")
def finished(server, tmp_path_factory, cache_dir):
    """A whole run, and what its ranks print."""
    folder, ops = tmp_path_factory.mktemp("finished") / "run", tmp_path_factory.mktemp("ops")
    changes = ["run.report=true", "run.rank_logs=true"]
    job = server.start(TRAIN, _arguments(folder, cache_dir, *changes), env={"TORCH_EXTENSIONS_DIR": str(ops)})
    assert job.wait(timeout_s=500) == [0, 0], job.output()[-6000:]
    printed = job.output()
    assert not list(ops.iterdir()), "an op was compiled"
    return folder, printed


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_result_table_is_printed_and_stored(finished):
    folder, printed = finished
    rows = {row["name"]: row for row in json.loads((folder / "result.json").read_text())}
    assert list(rows) == ["teacher", "homodistil"]
    assert rows["teacher"]["kl_to_teacher"] == 0 and rows["teacher"]["parameters"] == 4416698
    # 64-wide, 2 layers, 30522 words: formula by hand (tied decoder; biases, LayerNorms, positions, token types).
    layer = 4 * (64 * 64 + 64) + (64 * 256 + 256) + (256 * 64 + 64) + 4 * 64
    expected = (30522 + 512 + 2) * 64 + 2 * 64 + 2 * layer + (64 * 64 + 64 + 2 * 64) + 30522
    assert rows["homodistil"]["parameters"] == expected
    for row in rows.values():
        assert row["heldout_mlm_loss"] > 1 and 0 < row["masked_top1"] < 1
        assert row["name"] in printed
    assert rows["homodistil"]["tokens_per_s_first"] > 0 and rows["homodistil"]["hidden_size"] == 64


def test_lines_and_logs_tell_their_rank(finished):
    folder, printed = finished
    logs = {path.name: path.read_text() for path in (folder / "logs").iterdir()}
    assert set(logs) == {"rank-00000.txt", "rank-00001.txt"}
    start = next(line for line in logs["rank-00000.txt"].splitlines() if line.startswith("start: "))
    assert "2 ranks on 1 machine, ZeRO-2; launch and imports" in start and start in printed
    assert "corpus: training" in logs["rank-00000.txt"] and "start: " not in logs["rank-00001.txt"]
    others = [line for line in logs["rank-00001.txt"].splitlines() if line.strip()]  # none, as a rule
    assert all(f"[rank 1 {socket.gethostname()}] {line}" in printed for line in others), others


def test_learning_rate_grows_as_the_student_shrinks(finished):
    folder, _ = finished
    events = _lines(folder / "events.jsonl")
    initial, target = events[0]["widths_before"], events[-1]["widths_after"]
    cut = [axis for axis in target if target[axis] < initial[axis]]
    widths = {event["step"]: event["widths_after"] for event in events}
    now, expected = initial, []
    for step in range(1, STEPS + 1):  # the log tells the next update's, before an event; the decay is the second half
        now = widths.get(step - 1, now)
        progress = [(initial[axis] - now[axis]) / (initial[axis] - target[axis]) for axis in cut]
        share = 0.5 + 0.5 * sum(progress) / len(progress)
        expected.append(1e-3 * share * min(1, (STEPS - step) / (STEPS / 2)))
    rates = [line["optim/lr"] for line in _lines(folder / "metrics.jsonl") if line["kind"] == "train"]
    assert len(events) > 3 and rates == pytest.approx(expected)


def test_every_term_is_zero_before_the_first_step(finished):
    folder, _ = finished
    start = next(line for line in _lines(folder / "metrics.jsonl") if line["kind"] == "evaluation")
    gap = {name: value for name, value in start.items() if name.startswith("gap/")}
    assert gap.pop("gap/total") == pytest.approx(gap.pop("gap/mlm"))
    assert start["step"] == 0 and {"gap/kl", "gap/hidden/layer.1", "gap/attention/layer.0"} <= set(gap)
    assert all(abs(value) <= 1e-6 for value in gap.values()), gap


def test_metrics_and_events_tell_the_whole_story(finished):
    folder, _ = finished
    train = [line for line in _lines(folder / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    names = {"loss/total", "loss/mlm", "loss/kl", "loss/hidden/layer.0", "loss/attention/layer.1", "loss/embedding"}
    names |= {"optim/lr", "optim/grad_norm", "speed/tokens_per_s", "speed/mfu", "memory/rss_bytes", "widths/hidden"}
    assert names <= set(train[0])
    events = _lines(folder / "events.jsonl")
    assert len(events) >= 4 and events[-1]["widths_after"]["hidden"] == 64
    assert all(len(event["hash"]) == 64 and event["milliseconds"] > 0 for event in events)
    assert all({"kl", "hidden", "attention"} <= set(event["gap_before"]) & set(event["gap_after"]) for event in events)
    widths = [event["widths_after"]["hidden"] for event in events]
    assert widths == sorted(widths, reverse=True)
    board = EventAccumulator(str(folder / "tensorboard" / folder.name))
    board.Reload()
    assert {tag for tag, _ in board_values(dict.fromkeys(names, 0.0))} <= set(board.Tags()["scalars"])
    assert board.Scalars("model/width_hidden")[-1].value == 64


def test_export_is_the_engines_model(finished, cache_dir):
    """fp32 logits of the exported file against the master weights in the last checkpoint, on a padded batch."""
    folder, _ = finished
    model = BertForMaskedLM.from_pretrained(folder / "export").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    assert (model.config.hidden_size, model.config.intermediate_size, model.config.num_attention_heads) == (64, 256, 2)
    batch = tokenizer(["The president of the [MASK] states.", "A whale."], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
        # The engine's model keeps the teacher's softmax scale: 1/sqrt(64) instead of 1/sqrt(32) for 32-wide heads.
        shapes = {name: param.shape for name, param in model.named_parameters()}
        trained = _master_weights(folder / "checkpoints" / f"step-{STEPS:06d}", shapes)
        assert trained.keys() == shapes.keys()
        model.load_state_dict(trained, strict=False)
        for layer in model.bert.encoder.layer:
            assert layer.attention.self.scaling == 32**-0.5
            layer.attention.self.scaling = 64**-0.5
        torch.testing.assert_close(logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
    assert "fill-mask" in (folder / "export" / "README.md").read_text()


def _master_weights(checkpoint: Path, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Whole fp32 weights of the wrapped model, put together from all ranks' files."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for path in checkpoint.glob("state-*.safetensors"):
        for key, tensor in load_file(path).items():
            kind, name, start = key.split("/")
            if kind == "weight":
                pieces.setdefault(name.removeprefix("model."), {})[int(start)] = tensor
    return {n: torch.cat([p[i] for i in sorted(p)]).view(shapes[n]) for n, p in pieces.items() if n in shapes}


def test_report_and_configs_are_in_the_folder(finished):
    folder, _ = finished
    assert "homodistil" in (folder / "report.html").read_text()
    assert json.loads((folder / "ds_config.json").read_text())["gradient_accumulation_steps"] == 2
    assert "seq_len: 32" in (folder / "config.yaml").read_text()


def test_resume_after_resizes_is_bitwise_the_uninterrupted_run(server, finished, tmp_path, cache_dir):
    folder, _ = finished
    copy = _cut_off(folder, tmp_path / "run")
    server.run(TRAIN, _arguments(copy, cache_dir, "run.resume=auto"), num_ranks=2, timeout_s=500)
    ours, theirs = (load_file(path / "export" / "model.safetensors") for path in (copy, folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("metrics.jsonl", "events.jsonl"):
        assert _without_speed(_lines(copy / name)) == _without_speed(_lines(folder / name))
    ours, theirs = (path / "checkpoints" / f"step-{STEPS:06d}" for path in (copy, folder))
    tensors = sorted(path.name for path in theirs.glob("*.safetensors"))
    assert len(tensors) == 5  # masters and moments of two ranks, their random state, importance
    assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in tensors)
    ours, theirs = (json.loads((path / "run.json").read_text()) for path in (ours, theirs))
    assert ours["engine"] == theirs["engine"] and ours["state"] == theirs["state"]


def _cut_off(finished: Path, copy: Path) -> Path:
    """A copy as a power cut some steps after a checkpoint would have left it, several resizes in."""
    shutil.copytree(finished, copy)
    for leftover in (f"checkpoints/step-{STEPS:06d}", "checkpoints/step-000010", "export"):
        shutil.rmtree(copy / leftover)
    (copy / "row.json").unlink()
    (copy / "checkpoints" / "latest").write_text(f"step-{SAVE_EVERY:06d}\n")
    assert sum(event["step"] <= SAVE_EVERY for event in _lines(copy / "events.jsonl")) >= 2
    return copy


def test_one_rank_of_another_stage_goes_on_where_two_were_cut_off(server, finished, tmp_path, cache_dir):
    folder, _ = finished
    copy = _cut_off(folder, tmp_path / "run")
    engine = json.loads((ROOT / "ds_configs" / "zero2_fp32.json").read_text())
    (tmp_path / "zero1.json").write_text(json.dumps(engine | {"zero_optimization": {"stage": 1}}))
    others = ["run.resume=must", "train.micro_batch_size=4", "run.async_checkpoints=true"]
    arguments = _arguments(copy, cache_dir, *others)
    arguments[1] = str(tmp_path / "zero1.json")
    server.run(TRAIN, arguments, num_ranks=1, timeout_s=500)
    ours, theirs = (_lines(path / "metrics.jsonl") for path in (copy, folder))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    events = [_lines(path / "events.jsonl") for path in (copy, folder)]
    next_event = next(event["step"] for event in events[0] if event["step"] > SAVE_EVERY)
    for name in ("loss/total", "loss/mlm", "loss/attention", "loss/kl"):
        found, expected = ([line[name] for line in lines if name in line] for lines in (ours, theirs))
        # fp32 sums over one rank's rows instead of two, and another number of rows a micro-batch.
        assert found[:next_event] == pytest.approx(expected[:next_event], rel=1e-5, abs=1e-5), name
        # Later events solve for what these sums have moved (see the next test).
        assert found == pytest.approx(expected, rel=0.03 if name in ("loss/total", "loss/mlm") else 0.2), name
    # Hashes cover the maps of compensated events, so those of later events differ, too.
    for field in ("step", "widths_after"):
        assert len(events[0]) == len(events[1]) and [e[field] for e in events[0]] == [e[field] for e in events[1]]
    stages = [
        json.loads((copy / name).read_text())["zero_optimization"]["stage"]
        for name in ("ds_config.1.json", "ds_config.json")
    ]
    assert stages == [2, 1] and not list((copy / "checkpoints").glob(".step*"))


def test_one_rank_follows_the_same_path_as_two(server, finished, tmp_path, cache_dir):
    """Data order, masks, draws and means over the global batch do not depend on ranks or accumulation."""
    folder, _ = finished
    alone = tmp_path / "run"
    server.run(TRAIN, _arguments(alone, cache_dir, "train.micro_batch_size=8"), num_ranks=1, timeout_s=500)
    first_event = _lines(folder / "events.jsonl")[0]["step"]
    for name in ("loss/total", "loss/mlm", "loss/kl", "loss/attention", "widths/hidden", "optim/grad_norm"):
        ours, theirs = (
            [line[name] for line in _lines(path / "metrics.jsonl") if name in line] for path in (alone, folder)
        )
        # fp32 sums in another order.
        assert ours[:first_event] == pytest.approx(theirs[:first_event], rel=1e-5), name
        # Compensation solves for what Adam has moved, and Adam's normalisation lifts differences of tiny gradients:
        # 1 % in the total and 4 % in small terms were seen (one batch differs from the next by 5-10 %).
        assert ours == pytest.approx(theirs, rel=0.03 if name in ("loss/total", "loss/mlm") else 0.2), name
    first = [_lines(path / "events.jsonl")[0] for path in (alone, folder)]
    assert first[0]["gap_after"]["kl"] == pytest.approx(first[1]["gap_after"]["kl"], rel=5e-3)


def _without_speed(lines: list[dict]) -> list[dict]:
    measured = ("speed/", "memory/", "milliseconds")
    return [{name: value for name, value in line.items() if not name.startswith(measured)} for line in lines]


def _failing(server: ForkServer, arguments: list[str]) -> str:
    """What both ranks of a job wrote that does not come to a good end."""
    job = server.start(TRAIN, arguments)
    codes = job.wait_as_launcher(timeout_s=300)
    assert 0 not in codes
    return job.output()


def test_a_users_mistake_ends_all_ranks_with_one_line(server, tmp_path, cache_dir):
    output = _failing(server, _arguments(tmp_path / "run", cache_dir, "student.hidden_size=4096"))
    errors = [line for line in output.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "student.hidden_size: found 4096, the teacher has 128" in errors[0]
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(server, tmp_path, cache_dir):
    # lr x decay = 1000: every step multiplies the matrices by -999, the largest growth that the ranges allow.
    overrides = ["train.lr=10", "train.weight_decay=100", "train.warmup_fraction=0", "train.gradient_clipping=0"]
    # Only the MLM term drives: otherwise the gradients of the other terms overflow first.
    overrides += ["loss.kl=0", "loss.hidden=0", "loss.attention=0", "loss.embedding=0", "train.save_every_steps=1"]
    output = _failing(server, _arguments(tmp_path / "run", cache_dir, *overrides))
    errors = [line for line in output.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert errors[0].startswith("error: loss: attention")
    assert "is not finite at step" in errors[0] and "train.lr" in errors[0]
    checkpoints = tmp_path / "run" / "checkpoints"
    latest = checkpoints / (checkpoints / "latest").read_text().strip()
    assert (latest / "manifest.json").is_file() and not (tmp_path / "run" / "result.json").exists()
