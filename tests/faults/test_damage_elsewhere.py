"""Damage outside checkpoints: derived files are made again, log lines set aside, and other inputs refused.

Whatever was made again, the run ends bitwise where the undamaged one does.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.small_job import STEPS, TRAIN, arguments, differences, result

from homodistil.distributed.exit_codes import USER_ERROR

KILLED_AT = 8
"""Steps begun when the run to go on with was ended; the checkpoint before is that of step 6."""
KILL = {"HOMODISTIL_FAULT": f"train.step:hit={KILLED_AT}:action=kill"}
CORRECTION = ("teacher.correction_steps=3",)


def _run(server, command, env=None) -> tuple[list[int], str]:
    job = server.start(TRAIN, command, env=env)
    codes = job.wait(timeout_s=180)
    assert "Traceback" not in job.output(), job.output()
    return codes, job.output()


def _warnings(output: str) -> list[str]:
    return [line for line in output.splitlines() if "warning: " in line]


def _errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if "error: " in line]


class Broken:
    """A run that was killed, with inputs and cache of its own."""

    def __init__(self, folder: Path, killed: Path, overrides: tuple[str, ...]) -> None:
        shutil.copytree(killed, folder)
        self.folder, self.run, self.cache, self._overrides = folder, folder / "run", folder / "cache", overrides

    def command(self, *overrides: str) -> list[str]:
        return arguments(self.folder, self.run, "run.resume=auto", *self._overrides, *overrides)

    def corpus(self, name: str) -> Path:
        (path,) = (self.cache / "corpora").glob(f"*/{name}")
        return path

    def teacher(self, name: str) -> Path:
        (path,) = (self.cache / "teachers").glob(f"[!.]*/{name}")
        return path


def _killed(server, run_inputs, folder, *overrides) -> Path:
    """Inputs, cache and run folder of a run that was killed; paths in its config are its own."""
    shutil.copytree(run_inputs, folder, ignore=shutil.ignore_patterns("cache"))
    codes, output = _run(server, arguments(folder, folder / "run", *overrides), KILL)
    assert -9 in codes, output
    return folder


@pytest.fixture(scope="module")
def killed(server, run_inputs, tmp_path_factory):
    return _killed(server, run_inputs, tmp_path_factory.mktemp("killed") / "it")


@pytest.fixture(scope="module")
def killed_corrected(server, run_inputs, tmp_path_factory):
    return _killed(server, run_inputs, tmp_path_factory.mktemp("corrected") / "it", *CORRECTION)


@pytest.fixture(scope="module")
def corrected_reference(server, run_inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corrected-reference") / "run"
    codes, output = _run(server, arguments(run_inputs, folder, *CORRECTION))
    assert codes == [0, 0], output
    return folder


@pytest.fixture
def broken(killed, tmp_path) -> Broken:
    return Broken(tmp_path / "it", killed, ())


@pytest.fixture
def broken_corrected(killed_corrected, tmp_path) -> Broken:
    return Broken(tmp_path / "it", killed_corrected, CORRECTION)


def _swap_blocks(path: Path) -> None:
    blocks = np.load(path)
    blocks[[0, 1]] = blocks[[1, 0]]
    np.save(path, blocks)


def _change_token(path: Path) -> None:
    blocks = np.load(path)
    blocks[0, 1] ^= 1
    np.save(path, blocks)


def _flip_byte(path: Path, offset: int = -40) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def _zero_kilobyte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1024:] = bytes(1024)
    path.write_bytes(content)


def test_blocks_that_were_changed_or_swapped_are_noticed(server, broken, reference):
    """Both splits at once: each is hashed, and neither is trained on or evaluated with."""
    _swap_blocks(broken.corpus("train.npy"))
    _change_token(broken.corpus("heldout.npy"))
    codes, output = _run(server, broken.command())
    assert codes == [0, 0], output
    (warning,) = _warnings(output)
    assert "train.npy has another sha256 than manifest.json says); made again" in warning
    assert differences(result(broken.run), result(reference)) == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "correction.json", "gone"])
def test_a_damaged_corrected_teacher_is_made_again(server, broken_corrected, corrected_reference, name):
    if name == "gone":
        broken_corrected.teacher("correction.json").unlink()
    elif name == "model.safetensors":
        _zero_kilobyte(broken_corrected.teacher(name))
    else:
        _flip_byte(broken_corrected.teacher(name), 5)
    codes, output = _run(server, broken_corrected.command())
    assert codes == [0, 0], output
    (warning,) = _warnings(output)
    assert "is damaged (" in warning and "made again" in warning, output
    assert differences(result(broken_corrected.run), result(corrected_reference)) == []


def test_a_corrected_teacher_of_before_checksums_gets_them(server, broken_corrected, corrected_reference):
    broken_corrected.teacher("checksums.json").unlink()
    codes, output = _run(server, broken_corrected.command())
    assert codes == [0, 0] and _warnings(output) == [], output
    assert output.count("was made before corrected teachers had checksums") == 1
    assert broken_corrected.teacher("checksums.json").is_file()
    assert differences(result(broken_corrected.run), result(corrected_reference)) == []


def test_another_corrected_teacher_is_refused(server, broken_corrected, corrected_reference):
    """The one that the run began with is damaged, and with one rank less it cannot be made again bitwise; with two it
    can, and nothing of the try stands in the way."""
    _flip_byte(broken_corrected.teacher("model.safetensors"))
    config = (broken_corrected.run / "teacher.json").read_bytes()
    job = server.start(TRAIN, broken_corrected.command("train.micro_batch_size=4"), num_ranks=1)
    assert job.wait(timeout_s=180) == [USER_ERROR], job.output()
    (error,) = _errors(job.output())
    assert "teacher.correction_steps: is not what the run in" in error and "corrected teacher " in error
    assert "the ranks, ZeRO stage and precision that made it" in error
    assert (broken_corrected.run / "teacher.json").read_bytes() == config
    codes, output = _run(server, broken_corrected.command())
    assert codes == [0, 0], output
    assert differences(result(broken_corrected.run), result(corrected_reference)) == []


def test_bad_lines_of_the_logs_are_set_aside(server, broken, reference):
    """Torn, not UTF-8, no JSON, no object, a huge number, nested too deep; and one line is twice there."""
    path = broken.run / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    bad = [b'{"kind": "tr', b'{"step": 1, "x": "\xff"}', b"\0\0\0", b"[1]", b"7" * 5000, b"[" * 100_000, lines[3]]
    path.write_bytes(b"\n".join([lines[0], *bad[:3], *lines[1:], *bad[3:]]) + b"\n")
    events = (broken.run / "events.jsonl").read_bytes()
    (broken.run / "events.jsonl").write_bytes(b"nonsense\n" + events)
    codes, output = _run(server, broken.command())
    assert codes == [0, 0], output
    told = _warnings(output)
    assert len(told) == 2 and all("cannot be read or are duplicates; moved to" in line for line in told), told
    assert (broken.run / "metrics.jsonl.unreadable").read_bytes().split(b"\n")[:-1] == bad
    assert (broken.run / "events.jsonl.unreadable").read_bytes() == b"nonsense\n"
    assert differences(result(broken.run), result(reference)) == []


def test_lost_lines_are_told(server, broken):
    path = broken.run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["step"] not in (4, 5)))
    num_lost = sum(json.loads(line)["step"] in (4, 5) for line in lines)
    codes, output = _run(server, broken.command())
    assert codes == [0, 0], output
    (warning,) = _warnings(output)
    assert f"{path} has " in warning and "up to step 6, the checkpoint recorded " in warning
    numbers = [int(word.strip(",;")) for word in warning.split() if word.strip(",;").isdigit()]
    assert numbers[-1] - numbers[0] == num_lost


def _change_word(broken: Broken) -> None:
    path = broken.folder / "text" / "3.txt"
    path.write_text(path.read_text() + " fox")


def _add_file(broken: Broken) -> None:
    (broken.folder / "text" / "9.txt").write_text("five boxing wizards")


def _remove_file(broken: Broken) -> None:
    (broken.folder / "text" / "3.txt").unlink()


def _change_vocabulary(broken: Broken) -> None:
    path = broken.folder / "teacher" / "tokenizer.json"
    path.write_text(path.read_text().replace('"##y"', '"##fox"'))


def _change_weights(broken: Broken) -> None:
    _flip_byte(broken.folder / "teacher" / "model.safetensors", -37)


def _change_config(broken: Broken) -> None:
    path = broken.folder / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_norm_eps": 1e-6}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_change_word, "data.sources: is not what the run in"),
        (_add_file, "data.sources: is not what the run in"),
        (_remove_file, "data.sources: is not what the run in"),
        (_change_vocabulary, "began with (tokenizer "),
        (_change_weights, "began with (teacher "),
        (_change_config, "began with (teacher "),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_other_inputs_are_refused(server, broken, change, says):
    change(broken)
    before = {path: path.read_bytes() for path in broken.run.rglob("*") if path.is_file()}
    codes, output = _run(server, broken.command())
    assert codes == [USER_ERROR] * 2, output
    (error,) = _errors(output)
    assert says in error and ", now " in error and "or choose another run.dir" in error, error
    assert {path: path.read_bytes() for path in broken.run.rglob("*") if path.is_file()} == before


def test_the_same_inputs_elsewhere_are_gone_on_with(server, broken, reference):
    for name in ("text", "teacher"):
        (broken.folder / name).rename(broken.folder / f"moved-{name}")
    moved = f"data.sources=[{broken.folder / 'moved-text'}]", f"teacher.name={broken.folder / 'moved-teacher'}"
    codes, output = _run(server, broken.command(*moved))
    assert codes == [0, 0] and _warnings(output) == [], output
    assert differences(result(broken.run), result(reference)) == []


def test_a_checkpoint_of_before_fingerprints_is_gone_on_with(server, killed, broken, reference):
    """As 2922c66 wrote them: without fingerprints and without the number of log lines. Paths may not change then."""
    config = broken.run / "config.yaml"
    config.write_text(config.read_text().replace(str(killed), str(broken.folder)))
    for folder in (broken.run / "checkpoints").glob("step-*"):
        _forget(folder)
    codes, output = _run(server, broken.command())
    assert codes == [0, 0] and _warnings(output) == [], output
    assert output.count("before checkpoints had fingerprints of corpus, tokenizer and teacher") == 1
    assert differences(result(broken.run), result(reference)) == []


def _forget(folder: Path) -> None:
    from homodistil.checkpoint.files import write_json

    run = json.loads((folder / "run.json").read_text())
    del run["fingerprints"], run["state"]["num_lines"]
    record = write_json(folder / "run.json", run)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["run.json"] = {"bytes": record.num_bytes, "sha256": record.sha256}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_damaged_row_of_a_finished_run_is_made_again(server, run_inputs, reference, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    (folder / "row.json").write_bytes(b"{\xff")
    codes, output = _run(server, arguments(run_inputs, folder, "run.resume=auto"))
    assert codes == [0, 0], output
    (warning,) = _warnings(output)
    assert "row.json is damaged" in warning
    assert (folder / "checkpoints" / f"step-{STEPS:06d}").is_dir()
    assert differences(result(folder), result(reference)) == []
