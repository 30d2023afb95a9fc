"""What the commands have in common: their options, the head of the page, where results go."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness.environment import ROOT, environment
from benchmarks.harness.rows import to_json

RESULTS = ROOT / "benchmarks" / "results"


def parser(doc: str, quick: str | None = None) -> argparse.ArgumentParser:
    """A parser with `--json`, and `--quick` where `quick` says what that does; `doc` is the module's docstring."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="write rows here, and nothing under benchmarks/results/")
    if quick:
        made.add_argument("--quick", action="store_true", help=f"{quick}; writes no results")
    return made


def command() -> str:
    """The command line as a user types it."""
    spec = sys.modules["__main__"].__spec__
    name = spec.name.removesuffix(".__main__") if spec else "?"
    return shlex.join(["python", "-m", name, *sys.argv[1:]])


def page(title: str, *parts: str, facts: dict | None = None) -> str:
    """Markdown: the title, hardware and versions (and `facts`), the command, then `parts`; empty ones are left out."""
    listed = "\n".join(f"* {key}: {value}" for key, value in (environment() | (facts or {})).items())
    return "\n\n".join([f"# {title}", listed, f"    {command()}", *filter(None, parts)])


def publish(name: str, text: str, rows: Sequence[dict], args: argparse.Namespace) -> None:
    """Print the page; write it and the rows to results/, or (`--json`) the rows alone, or (`--quick`) nothing."""
    print(text)
    quick = getattr(args, "quick", False)
    if args.json or not quick:
        write(args.json or result_path(name, ".json"), to_json(rows))
    if not args.json and not quick:
        write(result_path(name, ".md"), text + "\n")


def result_path(name: str, end: str) -> Path:
    """benchmarks/results/{name}_{cpu or cuda}_{year and month}{end}"""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return RESULTS / f"{name}_{device}_{datetime.date.today():%Y%m}{end}"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")
