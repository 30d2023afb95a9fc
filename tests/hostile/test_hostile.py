"""Hostile inputs through the real commands: one clear line, one exit code, nothing lost, nobody left, in 30 seconds."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from case import Case

MODULES = sorted(path.stem for path in Path(__file__).parent.glob("cases_*.py"))
CASES = [case for name in MODULES for case in importlib.import_module(name).CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_line_and_nothing_lost(attempts, case: Case):
    ending = attempts.ending(case)
    told = "\n".join(ending.outputs)
    assert ending.codes == [case.code] * case.ranks, told
    assert "Traceback" not in told, told
    # Ranks that have not joined yet cannot know that another says the same; it is the same line, with their number.
    lines = re.findall(r"^(?:\[rank \d+ [^]]*\] )?error: (?:rank \d+: )?(.*)$", told, re.MULTILINE)
    assert len(set(lines)) == 1 and len(lines) <= case.ranks, f"{len(lines)} error lines\n{told}"
    speaking = [output.strip().splitlines()[-1] for output in ending.outputs if "error: " in output]
    assert all(lines[0] in last for last in speaking), f"the error is not the last line\n{told}"
    assert [text for text in case.says if text not in lines[0]] == [], lines[0]
    assert len(lines[0]) < 700, f"{len(lines[0])} characters: {lines[0]}"
    assert ending.orphans == [] and ending.changed == []


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
