"""Kills the real job again and again, at random moments, and looks whether it always ends as if nothing had happened.

    python tests/faults/many.py --kills 200 [--seed S] [--json FILE]

A run folder is killed one to four times, then goes on to its end; exports, logged losses, resize events and the last
checkpoint (weights, moments, random state) must be bitwise those of a run that nothing happened to. A kill is SIGKILL
to one rank, at a fault point of fault_injection.py or at a random instant; the others follow at once, as behind a
launcher, or are left to end by themselves. test_kills.py runs a few.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.fork_server import ForkServer, Job  # noqa: E402
from support.small_job import STEPS, TRAIN, arguments, differences, make_materials, result  # noqa: E402

from homodistil.distributed.exit_codes import RANK_LOST  # noqa: E402
from homodistil.distributed.fault_injection import POINTS, VARIABLE  # noqa: E402

NUM_RANKS = 2
ON_ANY_RANK = ("resize.before", "resize.moved", "checkpoint.shard_written", "train.step", "train.backward")
LIMIT_S = 300.0
AT_POINT = 0.65
"""Fraction of kills at a fault point; the others come at a random instant."""
SURVIVORS_ALONE = 0.15
"""Fraction of kills after which nobody ends the other rank: it must end by itself, naming the dead one."""


@dataclass
class Record:
    """What has happened so far."""

    seed: int
    kills: Counter = field(default_factory=Counter)
    """Moment -> kills; a moment is a fault point and rank, or where the job stood."""
    finished: int = 0
    """Run folders that went on to their end, bitwise equal."""
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def num_kills(self) -> int:
        return sum(self.kills.values())

    @property
    def num_inside(self) -> int:
        """Kills inside a resize event or inside the writing of a checkpoint."""
        return sum(n for moment, n in self.kills.items() if moment.startswith(("resize.", "checkpoint.")))

    def as_markdown(self) -> str:
        lines = [
            f"{self.num_kills} kills in {self.finished} run folders (seed {self.seed}), {self.seconds:.0f} s; "
            f"{self.num_inside} inside a resize event or a checkpoint; not bitwise equal afterwards: {len(self.wrong)}",
            "",
            "| moment | kills |",
            "|---|--:|",
        ]
        return "\n".join(lines + [f"| {moment} | {n} |" for moment, n in sorted(self.kills.items())] + self.wrong)


class Campaign:
    """Kills until there are enough."""

    def __init__(self, server: ForkServer, run_inputs: Path, work: Path, reference: Path, seed: int) -> None:
        self.server, self.run_inputs, self.work = server, run_inputs, work
        self.expected = result(reference)
        self.random = random.Random(seed)
        self.record = Record(seed)
        self.after_folder: Callable[[Record], None] = lambda _: None

    def run(self, num_kills: int) -> Record:
        start = time.monotonic()
        for i in range(10 * num_kills):
            if self.record.num_kills >= num_kills:
                break
            self._one_folder(self.work / f"run-{i}", min(self.random.randint(1, 4), num_kills - self.record.num_kills))
            self.record.seconds = time.monotonic() - start
            self.after_folder(self.record)
        return self.record

    def _one_folder(self, folder: Path, num_kills: int) -> None:
        moments = [self._start_and_kill(folder) for _ in range(num_kills)]
        job = self._start(folder)
        codes = job.wait(LIMIT_S)
        found = differences(result(folder), self.expected) if codes == [0] * NUM_RANKS else [f"exit codes {codes}"]
        if found:
            self.record.wrong.append(f"{folder.name} {moments}: {found[:8]}\n{job.output()[-1500:]}")
        else:
            self.record.finished += 1
            shutil.rmtree(folder)

    def _start(self, folder: Path, fault: str = "") -> Job:
        own = arguments(self.run_inputs, folder, "run.resume=auto")
        return self.server.start(TRAIN, own, NUM_RANKS, env={VARIABLE: fault})

    def _start_and_kill(self, folder: Path) -> str:
        """One start that does not come to its end, unless the moment chosen for it never comes."""
        at_point = self.random.random() < AT_POINT
        point = self.random.choice(POINTS)
        rank = self.random.randrange(NUM_RANKS) if point in ON_ANY_RANK else 0
        fault = f"{point}:rank={rank}:hit={self.random.randint(1, 4)}"
        job = self._start(folder, fault if at_point else "")
        if not at_point:
            rank = self.random.randrange(NUM_RANKS)
            self._wait_for_moment(job, folder)
            job.kill(rank)
        moment = f"{point}, rank {rank}" if at_point else f"{_stage(folder)}, rank {rank}"
        if self._end(job):
            self.record.kills[moment] += 1
        return moment

    def _wait_for_moment(self, job: Job, folder: Path) -> None:
        """Some logged steps, and a little more."""
        lines, before = self.random.randint(0, STEPS), _num_lines(folder)
        deadline = time.monotonic() + LIMIT_S
        while job.is_running() and _num_lines(folder) < max(lines, before + (lines > 0)):
            if time.monotonic() > deadline:
                return  # `_end` reports it
            time.sleep(0.005)
        time.sleep(self.random.uniform(0, 0.3))

    def _end(self, job: Job) -> bool:
        """Until all ranks have ended. Returns whether one of them was killed by us."""
        deadline = time.monotonic() + LIMIT_S
        while job.is_running() and -9 not in job.codes():
            if time.monotonic() > deadline:
                self.record.wrong.append(f"a start that hangs, {job.codes()}:\n{job.output()[-1500:]}")
                break
            time.sleep(0.005)
        killed = -9 in job.codes()
        if killed and self.random.random() < SURVIVORS_ALONE:
            codes = job.wait(LIMIT_S)
            if sorted(codes) not in ([-9, 0], [-9, RANK_LOST]):
                self.record.wrong.append(f"the survivor of {codes} should have ended with {RANK_LOST}:\n{job.output()}")
        job.kill()
        job.wait(LIMIT_S)
        return killed


def _num_lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _stage(folder: Path) -> str:
    if not (folder / "config.yaml").is_file():
        return "starting"
    if (folder / "export").is_dir():
        return "after the export"
    return "training" if _num_lines(folder) else "before step 1"


def _note(path: Path | None, record: Record) -> None:
    """How far we are: a long run may be interrupted."""
    print(f"{record.num_kills} kills, {len(record.wrong)} wrong, {record.seconds:.0f} s", file=sys.stderr, flush=True)
    if path:
        path.write_text(json.dumps(vars(record), indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the record there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ForkServer() as server:
        work = Path(folder)
        make_materials(work)
        reference = work / "reference"
        job = server.start(TRAIN, arguments(work, reference), NUM_RANKS)
        assert job.wait(LIMIT_S) == [0] * NUM_RANKS, job.output()
        campaign = Campaign(server, work, work, reference, options.seed)
        campaign.after_folder = functools.partial(_note, options.json)
        record = campaign.run(options.kills)
    print(record.as_markdown())
    return 1 if record.wrong or record.num_kills < options.kills else 0


if __name__ == "__main__":
    sys.exit(main())
