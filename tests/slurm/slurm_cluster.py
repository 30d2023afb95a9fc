"""A real SLURM of two virtual nodes on this machine, for tests: Debian's slurmctld and slurmd, in one sandbox.

with Cluster(folder) as cluster:
    job = cluster.submit(ROOT / "launcher/slurm/train.sbatch", ["run.dir=..."], options=["--nodes=2"])
    cluster.run("scancel", "--signal=USR1", job)
    assert cluster.wait(job, timeout_s=120) == "COMPLETED", cluster.output(job)
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare", "nsenter", "setpriv", "ip")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"}
POLL_S = 0.2
START_S = 60


def why_not() -> str | None:
    """Why no cluster can be started here, None when one can."""
    if os.geteuid() != 0:
        return "SLURM tests need root (namespaces, slurmd)"
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"SLURM tests need {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client iproute2"
    probe = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True)
    return f"SLURM tests need namespaces: {probe.stderr.strip()}" if probe.returncode else None


_UNSHARE = "unshare --net --mount --uts --pid --fork --kill-child --mount-proc".split()


class Cluster:
    """A context manager; leaving it ends every process of the cluster and its jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = folder / "slurm"
        self._log.mkdir(parents=True)

    def __enter__(self) -> Cluster:
        script = str(Path(__file__).with_name("sandbox.sh"))
        # If the tests are killed the sandbox goes with them.
        command = ["setpriv", "--pdeathsig", "KILL", *_UNSHARE, "bash", script, str(self._log)]
        with open(self._log / "sandbox.out", "w") as log:
            self._outer = subprocess.Popen(command, stderr=log)
        deadline = time.monotonic() + START_S
        while not self._is_ready():
            if self._outer.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                logs = "\n".join(path.read_text()[-1000:] for path in self._log.glob("*.out"))
                raise AssertionError(f"SLURM did not start:\n{logs}")
            time.sleep(POLL_S)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._outer.kill()  # --kill-child: its child is the first process of the sandbox, all others end with it
        self._outer.wait()

    def _is_ready(self) -> bool:
        if not (children := psutil.Process(self._outer.pid).children()):
            return False
        self._inner_pid = children[0].pid
        try:
            return len(set(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split())) == 2
        except subprocess.CalledProcessError:
            return False

    def run(self, *command: str, env: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
        """Standard output of a command inside the cluster. Raises `subprocess.CalledProcessError`."""
        enter = ["nsenter", f"--target={self._inner_pid}", "--net", "--mount", "--uts", "--pid", f"--wdns={cwd}"]
        environment = os.environ | {"SLURM_CONF": str(self._log / "slurm.conf")} | (env or {})
        done = subprocess.run(
            [*enter, *command], env=environment, check=True, capture_output=True, text=True, timeout=60
        )
        return done.stdout

    def submit(self, script: Path, arguments: list[str], options: list[str], env: dict[str, str] | None = None) -> str:
        """Submit a script in the repository's root; the job's number. `env` reaches the job."""
        log = f"--output={self.folder}/job-%A-%a.txt" if any("--array" in o for o in options) else self._output_option()
        return self.run("sbatch", "--parsable", log, *options, str(script), *arguments, env=env).strip()

    def _output_option(self) -> str:
        return f"--output={self.folder}/job-%j.txt"

    def output(self, job: str) -> str:
        """What the job's scripts (also of an array) have said so far."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob(f"job-{job}[.-]*txt")))

    def states(self, job: str) -> set[str]:
        """JobState of the job, or of every element of an array."""
        return set(re.findall(r"\bJobState=(\w+)", self.run("scontrol", "show", "job", "-o", job)))

    def has_stopped_process(self) -> bool:
        """Whether a process of a job stands still by SIGSTOP."""
        for process in psutil.Process(self._outer.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() == psutil.STATUS_STOPPED:
                    return True
        return False

    def restarts(self, job: str) -> int:
        return int(re.search(r"\bRestarts=(\d+)", self.run("scontrol", "show", "job", "-o", job))[1])

    def wait(self, job: str, timeout_s: float) -> str:
        """Its state once it has ended for good ("COMPLETED+FAILED" for an array that did both)."""
        deadline = time.monotonic() + timeout_s
        while not (states := self.states(job)) <= ENDED:
            assert time.monotonic() < deadline, f"{states} after {timeout_s} s\n{self.output(job)}"
            time.sleep(POLL_S)
        return "+".join(sorted(states))
