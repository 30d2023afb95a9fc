"""Everything that needs an NVIDIA GPU, in one command, on a machine without a network: GPU tests, then all benchmarks.

    python benchmarks/gpu_suite.py --dry-run --out out                     # what would run, with which limits
    python benchmarks/gpu_suite.py --wheels wheels --out out               # 9 minutes in all
    python benchmarks/gpu_suite.py --only kernels throughput --out out

Nothing is fetched, and nothing on the machine is replaced: wheels from `--wheels` go to a folder of their own, each
only if its package is missing, and without its dependencies, so that the machine's torch and triton stay. Every item
has a share of the time that is left and is ended when it is over; the next one starts whatever became of it. The
results folder is complete after every item:

    report.md          verdicts, hardware, versions, commit, and what each benchmark printed as Markdown
    results.json       rows of all benchmarks (benchmarks/harness/rows.py), each with its item's name
    environment.json   nvidia-smi, all package versions, commit, verdicts
    log.txt            output of everything

Exit code: 0 everything that is there passed, 1 something did not, 2 cannot start.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten

ROOT = Path(__file__).resolve().parents[1]
GRACE_S = 5
"""Between the request to end and the end of an item that is out of time."""


@dataclass(frozen=True)
class Item:
    name: str
    target: str
    """A module, or for the tests their folder; an item whose file is not there is passed over."""
    arguments: tuple[str, ...]
    share_s: int
    """Seconds if all items take their share; what one leaves goes to the later ones."""

    def command(self, rows: Path) -> list[str]:
        if self.name == "tests":
            return [sys.executable, "-m", "pytest", *self.arguments, *gpu_tests()]
        return [sys.executable, "-m", self.target, *self.arguments, "--json", str(rows)]

    @property
    def is_there(self) -> bool:
        path = ROOT / self.target.replace(".", "/")
        return path.is_dir() or path.with_suffix(".py").is_file()


_FRIENDLY = "pruning.width_multiple=64"
_EVENTS = ("--ranks", "1", "--engines")
ITEMS = [
    Item("tests", "tests/gpu", ("-m", "gpu and not full", "-q", "-rs", "-p", "no:cacheprovider"), 150),
    Item("kernels", "benchmarks.speed.kernels", (), 115),
    Item("throughput", "benchmarks.speed.throughput", ("--shapes", "homobert-base", "--set", _FRIENDLY), 120),
    Item("resize", "benchmarks.speed.resize", ("--quick", *_EVENTS, "ZeRO-2 bf16"), 40),
    Item("memory", "benchmarks.memory.resize_events", ("--size", "tiny", *_EVENTS, "ZeRO-2 fp32"), 30),
    Item("peers", "benchmarks.peers", ("--quick",), 50),
    Item("scaling", "benchmarks.speed.scaling", ("--quick",), 30),
]
"""In order of importance: the last ones lose if time runs out."""


def gpu_tests() -> list[str]:
    """Files with tests of the marker. Others are not even imported: they may need packages that are not here."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]


@dataclass
class Outcome:
    name: str
    verdict: str
    """passed, failed, out of time, not there."""
    seconds: float = 0.0
    detail: str = ""

    @property
    def is_good(self) -> bool:
        return self.verdict in ("passed", "not there")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results folder, made if it is not there")
    parser.add_argument("--wheels", type=Path, help="folder of .whl files for packages that the machine lacks")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--only", nargs="+", choices=[item.name for item in ITEMS], help="these items alone")
    parser.add_argument("--commit", help="of this tree, where git cannot tell")
    parser.add_argument("--dry-run", action="store_true", help="print the plan; run and write nothing")
    return parser.parse_args()


def missing_wheels(folder: Path) -> list[Path]:
    """Wheels whose package is not installed, whatever its version."""

    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    wheels = sorted(folder.glob("*.whl"))
    installed = {normal(d.metadata["Name"]) for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return [wheel for wheel in wheels if normal(wheel.name.split("-")[0]) not in installed]


def pip_command(wheels: list[Path], site: Path) -> list[str]:
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check"]
    return [sys.executable, "-m", "pip", "install", *options, "--target", str(site), *map(str, wheels)]


def item_environment(site: Path) -> dict[str, str]:
    """For every item: this tree and the wheels first, and the GPU as DeepSpeed's accelerator."""
    paths = [str(site), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "DS_ACCELERATOR": "cuda",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("TRITON_INTERPRET", None)  # would turn every kernel into slow Python
    return environment


def limit_s(item: Item, later: list[Item], left_s: float) -> float:
    """Seconds for `item`: its share of what is left, the other shares being those of the items behind it."""
    return left_s * item.share_s / (item.share_s + sum(other.share_s for other in later))


class Suite:
    """The results folder, and what is known so far."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.out, self.scratch = args, args.out, scratch
        self.site = scratch / "site"
        self.deadline = time.monotonic() + 60 * args.minutes
        self.outcomes: list[Outcome] = []
        self.rows: list[dict] = []
        self.markdown: dict[str, str] = {}
        self.facts: dict = {}

    def prepare(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "log.txt").write_text("")
        wheels = missing_wheels(self.args.wheels) if self.args.wheels else []
        if wheels:
            self.outcomes.append(self.run_logged("install", pip_command(wheels, self.site), 90)[0])
            sys.path.insert(0, str(self.site))
        self.facts = environment(self.args.commit)
        self.facts["installed_wheels"] = [wheel.name for wheel in wheels]
        self.write()

    def run(self, items: list[Item]) -> None:
        for number, item in enumerate(items):
            self.outcomes.append(self.run_item(item, items[number + 1 :]))
            self.write()

    def run_item(self, item: Item, later: list[Item]) -> Outcome:
        if not item.is_there:
            return Outcome(item.name, "not there", detail=item.target)
        rows = self.scratch / f"{item.name}.json"
        limit = limit_s(item, later, self.deadline - time.monotonic() - GRACE_S)
        outcome, output = self.run_logged(item.name, item.command(rows), max(limit, 1.0))
        if item.name == "tests":
            judge_tests(outcome, output)
        self.markdown[item.name] = markdown_of(output)
        if rows.exists():
            self.rows += [{"item": item.name, **row} for row in json.loads(rows.read_text())]
        elif item.name != "tests" and outcome.is_good:
            outcome.verdict, outcome.detail = "failed", "wrote no rows"
        return outcome

    def run_logged(self, name: str, command: list[str], limit: float) -> tuple[Outcome, str]:
        """Runs `command` for at most `limit` seconds, output at the end of log.txt. Ends all that it started."""
        start = time.monotonic()
        print(f"{name}: at most {limit:.0f} s: {shorten(' '.join(command), 200)}", flush=True)
        with (self.scratch / "output.txt").open("w+") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=item_environment(self.site),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that all it started can be ended
            )
            code = wait(process, limit)
            output.seek(0)
            text = output.read()
        seconds = time.monotonic() - start
        verdict = "out of time" if code is None else "passed" if code == 0 else "failed"
        outcome = Outcome(name, verdict, seconds, "" if not code else f"exit code {code}")
        with (self.out / "log.txt").open("a") as log:
            log.write(f"\n##### {name}: {verdict} after {seconds:.1f} s\n$ {' '.join(command)}\n{text}\n")
        print(f"{name}: {verdict} after {seconds:.1f} s", flush=True)
        return outcome, text

    def write(self) -> None:
        lines = ",\n".join(map(json.dumps, self.rows))
        (self.out / "results.json").write_text(f"[\n{lines}\n]\n")
        facts = self.facts | {"outcomes": [asdict(outcome) for outcome in self.outcomes]}
        (self.out / "environment.json").write_text(json.dumps(facts, indent=1) + "\n")
        (self.out / "report.md").write_text(self.report())

    def report(self) -> str:
        head = ["# GPU suite", "", *[f"* {key}: {value}" for key, value in self.facts["machine"].items()], ""]
        head += ["| item | verdict | s | |", "|---|---|--:|---|"]
        head += [f"| {o.name} | {o.verdict} | {o.seconds:.0f} | {o.detail} |" for o in self.outcomes]
        parts = [f"<!-- {name} -->\n{text}" for name, text in self.markdown.items() if text]
        return "\n\n".join(["\n".join(head), *parts]) + "\n"


def wait(process: subprocess.Popen, limit: float) -> int | None:
    """Exit code, or None when the process and all it started had to be ended."""
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(process.pid, number)
            try:
                process.wait(timeout=GRACE_S)
                break
            except subprocess.TimeoutExpired:
                continue
        return None


def judge_tests(outcome: Outcome, output: str) -> None:
    """Skipped tests prove nothing: at least one has to have passed."""
    counts = re.findall(r"^=*\s*((?:\d+ [a-z]+(?:, )?)+) in [\d.]+s", output, flags=re.MULTILINE)
    outcome.detail = counts[-1] if counts else outcome.detail or "no summary"
    if outcome.verdict == "passed" and " passed" not in outcome.detail:
        outcome.verdict = "failed"


def markdown_of(output: str) -> str:
    """What a benchmark printed from its first heading on."""
    match = re.search(r"^# .*", output, flags=re.MULTILINE | re.DOTALL)
    return match.group(0).rstrip() if match else ""


def environment(commit: str | None) -> dict:
    from benchmarks.harness.environment import environment as machine_facts

    machine = machine_facts()
    if commit:
        machine["commit"] = commit
    versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    machine |= {name: versions[name] for name in ("triton", "liger-kernel", "numpy") if name in versions}
    return {"machine": machine, "nvidia_smi": nvidia_smi(), "versions": dict(sorted(versions.items()))}


def nvidia_smi() -> str:
    if shutil.which("nvidia-smi") is None:
        return "not there"
    return subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout


def print_plan(items: list[Item], args: argparse.Namespace) -> None:
    if args.wheels:
        names = [wheel.name for wheel in missing_wheels(args.wheels)]
        print(f"install  {', '.join(names) or 'nothing: every given package is there'}")
    left = 60 * args.minutes - GRACE_S
    for number, item in enumerate(items):
        limit = limit_s(item, items[number + 1 :], left)
        left -= limit
        there = "" if item.is_there else "  (not there: passed over)"
        command = " ".join(item.command(Path(f"{item.name}.json"))[1:])
        print(f"{item.name:<11}{limit:4.0f} s  python {command}{there}")
    print(f"results in {args.out}")


def main() -> int:
    args = parse_args()
    items = [item for item in ITEMS if args.only is None or item.name in args.only]
    if args.dry_run:
        print_plan(items, args)
        return 0
    if args.wheels and not args.wheels.is_dir():
        print(f"--wheels: no folder {str(args.wheels)!r}", file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print("no NVIDIA GPU that torch can use here; --dry-run shows the plan", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        suite = Suite(args, Path(scratch))
        suite.prepare()
        suite.run(items)
    return 0 if all(outcome.is_good for outcome in suite.outcomes) else 1


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of this folder
    sys.exit(main())
