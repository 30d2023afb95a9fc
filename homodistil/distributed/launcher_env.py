"""Rank variables under launchers that do not set torch's: SLURM_* of srun and OMPI_* of mpirun -> RANK, ...

The `deepspeed` launcher (also with pdsh or --no_ssh) and torchrun set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT; these values have priority, also inside a SLURM job. If one of the five were missing, DeepSpeed would try
to get it from mpi4py.
"""

from __future__ import annotations

import os
import subprocess

from homodistil.errors import UserError

_FIRST_PORT, _NUM_PORTS = 20000, 10000  # below the range from which Linux assigns ports


def rank_before_joining() -> int:
    """Rank of this process according to its launcher, 0 without one. For messages before the process group exists."""
    names = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
    text = next((os.environ[name] for name in names if name in os.environ), "0")
    return int(text) if _is_number(text) else 0  # `check_rank_variables` will refuse a value that is not a number


def is_under_launcher() -> bool:
    """Whether a launcher has started this process as one of several ranks, or has set torch's variables for one."""
    env = os.environ
    num_ranks = env.get("OMPI_COMM_WORLD_SIZE", "1"), env.get("SLURM_NTASKS", "1") if "SLURM_PROCID" in env else "1"
    return "RANK" in env or any(number != "1" for number in num_ranks)


def check_rank_variables() -> None:
    """Raise `UserError` if one of torch's five rank variables is missing or has an impossible value."""
    world_size = _number("WORLD_SIZE", 1, 1 << 20)
    _number("RANK", 0, world_size - 1)
    _number("LOCAL_RANK", 0, world_size - 1)
    _number("MASTER_PORT", 1, 65535)
    if not os.environ.get("MASTER_ADDR"):
        raise UserError(f"MASTER_ADDR: not set, although RANK is; {_ADVICE}")


_ADVICE = "start the script through deepspeed, torchrun, srun or mpirun, which set it, or unset RANK for a single rank"


def _number(name: str, least: int, most: int) -> int:
    text = os.environ.get(name)
    if text is None:
        raise UserError(f"{name}: not set, although RANK is; {_ADVICE}")
    if not _is_number(text) or not least <= int(text) <= most:
        raise UserError(f"{name}: found {text[:40]!r}, allowed: {least} .. {most}; {_ADVICE}")
    return int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def adopt_launcher_variables() -> None:
    """Set torch's rank variables from those of srun or mpirun, unless RANK is set or there is only one rank.

    Raises:
        UserError: under mpirun on several machines without MASTER_ADDR, or under srun if the first node is not known.
    """
    env = os.environ
    if "RANK" in env:
        return
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        _adopt_openmpi()
    elif "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        _adopt_slurm()


def _adopt_slurm() -> None:
    env = os.environ
    env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env["SLURM_NTASKS"], env["SLURM_LOCALID"]
    if "MASTER_ADDR" not in env:  # containers have no scontrol, so launcher/slurm sets it outside
        env["MASTER_ADDR"] = _first_host(env["SLURM_JOB_NODELIST"])
    # Every rank derives the same port, and jobs that share a node get different ones.
    env.setdefault("MASTER_PORT", str(_port_of(env["SLURM_JOB_ID"])))


def _first_host(node_list: str) -> str:
    command = ["scontrol", "show", "hostnames", node_list]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            f"MASTER_ADDR: not set, and `{' '.join(command)}` does not name the first node ({error}); "
            f"export MASTER_ADDR (launcher/slurm/train.sbatch does)"
        ) from None


def _adopt_openmpi() -> None:
    env = os.environ
    size, local_size = env["OMPI_COMM_WORLD_SIZE"], env["OMPI_COMM_WORLD_LOCAL_SIZE"]
    if "MASTER_ADDR" not in env and local_size != size:
        raise UserError(
            f"MASTER_ADDR: not set, and mpirun's {size} ranks are on several machines; name the machine of rank 0, "
            f"for example mpirun -x MASTER_ADDR=node1 -x MASTER_PORT=29500 ..."
        )
    env["RANK"], env["WORLD_SIZE"] = env["OMPI_COMM_WORLD_RANK"], size
    env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"] = env["OMPI_COMM_WORLD_LOCAL_RANK"], local_size
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    env.setdefault("MASTER_PORT", str(_port_of(env.get("OMPI_MCA_ess_base_jobid", "0"))))


def _port_of(job: str) -> int:
    return _FIRST_PORT + int(job) % _NUM_PORTS
