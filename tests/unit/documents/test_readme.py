"""Commands of README and docs/ as typed: launchers are told how many ranks, and scripts take every argument."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from homodistil.cli import COMMANDS as SUBCOMMANDS
from homodistil.config.command_line import parse, parse_job
from homodistil.data.prepare.filters import _INSTALLED_AS

ROOT = Path(__file__).parents[3]
DOCUMENTS = [ROOT / "README.md", ROOT / "SKILL.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("deepspeed", "homodistil", "python", "sbatch", "torchrun")


def _commands(path: Path) -> list[list[str]]:
    """Words of every command in the document's code blocks; continued lines are one, comments are left out."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    fields = re.search(r"`FIELDS` stands for `(.*)`", text)
    lines = "\n".join(blocks).replace("\\\n", " ").replace("FIELDS", fields[1] if fields else "").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(PROGRAMS)]


COMMANDS = [command for path in DOCUMENTS for command in _commands(path)]


def test_there_are_commands():
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "deepspeed"], ids=" ".join)
def test_the_launcher_is_told_how_many_ranks(command):
    assert {"--num_accelerators", "--hostfile"} & set(command)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "launcher/" in " ".join(c)], ids=" ".join)
def test_the_script_takes_these_arguments(command, tmp_path, monkeypatch):
    script = next(word for word in command if word.startswith("launcher/"))
    arguments = [word for word in command[command.index(script) + 1 :] if word != "..."]
    assert (ROOT / script).exists()
    monkeypatch.chdir(tmp_path)
    Path("ds_configs").symlink_to(ROOT / "ds_configs")
    if script == "launcher/train.py":
        for name in _students(arguments):
            Path(name).write_text("student: {hidden_size: 64, intermediate_size: 256, num_attention_heads: 2}\n")
        assert parse_job(arguments).config
    elif script == "launcher/plan.py":
        from homodistil.config.command_line import parse_with_engine
        from homodistil.planning.options import split_options

        assert parse_with_engine(split_options(arguments, "")[1])
    elif script == "launcher/prepare_data.py":
        from homodistil.data.prepare.array_tasks import split_task

        assert parse(split_task(arguments)[1])
    elif script.endswith(".py"):
        place = SUBCOMMANDS[Path(script).stem].place
        assert importlib.import_module(place.partition(":")[0]).parser().parse_args(arguments)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "homodistil"], ids=" ".join)
def test_the_command_takes_these_fields(command):
    assert command[1] in SUBCOMMANDS
    if command[1] in {"train", "check"}:
        assert parse(command[2:], with_engine=True)


def _students(arguments: list[str]) -> list[str]:
    if "--teachers-once" not in arguments:
        return []
    return arguments[arguments.index("--teachers-once") + 1].split(",")


def test_nobody_is_sent_to_the_package_of_our_name_on_the_index():
    texts = [path.read_text(encoding="utf-8") for path in [*DOCUMENTS, *ROOT.glob("homodistil/**/*.py")]]
    assert not [text for text in texts if re.search(r"pip install ['\"]?homodistil\b", text)]
    assert _INSTALLED_AS.keys() == {"datatrove", "datasketch"}
