"""launcher/train.py --check on real ranks: one table, exit code 0 or 2, and nothing written into the run folder."""

import gzip
import os
import random
import socket

import pytest
from support.small_job import TRAIN, arguments

from homodistil.config.schema import DataConfig
from homodistil.distill.teacher import load_config, load_tokenizer
from homodistil.distributed.exit_codes import USER_ERROR
from homodistil.preflight.disk import check_disk
from homodistil.preflight.findings import Finding, Findings, merged
from homodistil.preflight.memory import check_memory
from homodistil.preflight.port import check_port
from homodistil.preflight.text import check_text


@pytest.fixture
def check(server, run_inputs, tmp_path):
    """Check with overrides on two ranks; (exit codes, output). Nothing may have been written."""

    def check(*overrides):
        job = server.start(TRAIN, [*arguments(run_inputs, tmp_path / "runs" / "a", *overrides), "--check"])
        codes = job.wait(timeout_s=120)
        assert not (tmp_path / "runs").exists() and "Traceback" not in job.output(), job.output()
        return codes, job.output()

    return check


def _verdicts(output: str) -> list[tuple[str, str]]:
    rows = [line.split() for line in output.splitlines()]
    return [(" ".join(row[: row.index(word)]), word) for row in rows for word in ("ok", "BAD") if word in row[1:3]]


def test_a_good_run_takes_a_step_and_a_cut_on_every_rank(check):
    codes, output = check()
    assert codes == [0, 0], output
    summary = ["task", "student", "layers", "parameters", "losses", "learning rate", "pruning"]
    subjects = ["port", "config", "model", *summary, "memory", "data", "run folder", "cache folder", "step"]
    assert _verdicts(output) == [(subject, "ok") for subject in subjects], output
    assert "3 layers, hidden 12, ffn 20, 4 heads of 3; from a copy of" in output and "compensation none" in output
    assert "forward, backward, step, cut to hidden" in output and "this run can start" in output


def test_everything_that_is_wrong_is_said_at_once(check, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"PK\x03\x04\x00\x00\xff\xfe" * 50)
    overrides = ("train.global_batch_size=7", f"data.sources=[{tmp_path / 'text.txt'},/nowhere/wiki]")
    codes, output = check(*overrides, "run.resume=must", "teacher.own_stream=true")
    assert codes == [USER_ERROR, USER_ERROR], output
    for part in ("train.global_batch_size: 7 is not divisible", "is not text: a NUL byte", "/nowhere/wiki"):
        assert part in output, output
    assert "teacher.own_stream: true needs an NVIDIA GPU" in output and "run.resume: must, but" in output
    assert "choose a multiple of" in output and "5 to fix before" in output
    assert ("step", "ok") not in _verdicts(output)


def _nested(folder):
    (folder / "a.jsonl").write_text("[" * 200_000)


def _huge_number(folder):
    (folder / "a.jsonl").write_text("7" * 5000)


def _half_a_pair(folder):
    (folder / "a.jsonl").write_text('{"text": "fox \\udfff"}')


def _circle(folder):
    (folder / "a.txt").symlink_to("a.txt")


def _torn(folder):
    (folder / "a.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(99).hex().encode() * 99)[:-20])


@pytest.mark.parametrize(
    "write, said",
    [
        (lambda folder: os.mkfifo(folder / "a.txt"), "a.txt' is a named pipe"),
        (_circle, "symbolic links"),
        (_nested, "a.jsonl:1: not valid JSON (nested too deeply)"),
        (_huge_number, "a.jsonl:1: not valid JSON (a number with thousands of digits)"),
        (_half_a_pair, "a.jsonl:1: 'text' holds \\udfff"),
        (_torn, "give a whole gzip file"),
    ],
)
def test_text_that_cannot_be_read(run_inputs, tmp_path, write, said):
    """As in a preparation, which the table of hostile inputs is about."""
    write(tmp_path)
    findings = Findings()
    tokenizer = load_tokenizer(f"{run_inputs}/teacher", load_config(f"{run_inputs}/teacher"))
    assert check_text(findings, DataConfig(sources=[str(tmp_path)], seq_len=16), tokenizer) is None
    (finding,) = findings
    assert not finding.is_good and said in f"{finding.found}; {finding.fix}"


def test_text_that_comes_twice(run_inputs):
    findings = Findings()
    tokenizer = load_tokenizer(f"{run_inputs}/teacher", load_config(f"{run_inputs}/teacher"))
    sources = [f"{run_inputs}/text", f"{run_inputs}/text/3.txt"]
    assert check_text(findings, DataConfig(sources=sources, seq_len=16), tokenizer) is None
    assert [finding.is_good for finding in findings] == [True, True, False]
    assert "name each text once" in findings[-1].fix


@pytest.mark.parametrize(
    "override, said",
    [
        ("teacher.name=/nowhere/bert", "teacher.name: no folder '/nowhere/bert'"),
        ("student.hidden_size=32", "student.hidden_size: found 32, the teacher has 24"),
        ("pruning.max_event_fraction=0.01", "pruning.max_event_fraction"),
        ("student.hidden_size=null", "student.hidden_size: not set beside intermediate_size=20, num_attention_heads=4"),
    ],
)
def test_a_teacher_or_target_that_does_not_fit(check, override, said):
    codes, output = check(override)
    assert codes == [USER_ERROR, USER_ERROR] and said in output and "fix: " in output, output


def test_a_port_that_is_taken(monkeypatch):
    with socket.create_server(("", 0)) as other:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        monkeypatch.setenv("RANK", "0")
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        check_port(taken := Findings())
    check_port(free := Findings())
    assert not taken.are_good and "another process listens there" in taken[0].found and free == []


def test_a_disk_and_a_memory_that_are_too_small(tmp_path):
    import torch

    findings = Findings()
    check_disk(findings, "run folder", tmp_path / "a" / "b", 1 << 60)
    check_memory(findings, 1e18, torch.device("cpu"))
    check_disk(findings, "cache folder", tmp_path / "a", 1)
    assert [finding.is_good for finding in findings] == [False, False, True] and not list(tmp_path.iterdir())


def test_ranks_are_named_where_not_all_are_well():
    well, ill = Finding("memory", "plenty"), Finding("memory", "little", "buy some")
    rows = merged([[well], [ill], [ill], [well]])
    assert [row.found for row in rows] == ["ranks 0, 3: plenty", "ranks 1-2: little"] and not rows.are_good
    assert merged([[well], [Finding("memory", "plenty, too")]]) == [well]
