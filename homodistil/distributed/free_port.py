"""Chooses the TCP port at which the ranks of this machine join."""

from __future__ import annotations

import random
import socket
from pathlib import Path

LOWEST_PORT = 20000
"""Below it are the well-known services."""
EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""Linux: first and last port that the kernel gives to outgoing connections."""
DEFAULT_EPHEMERAL_START = 32768
ATTEMPTS = 100
"""Ports that are drawn before the kernel chooses one of its own range."""


def free_port() -> int:
    """A TCP port on which no process of this machine listens, outside the range of ephemeral ports where possible.

    The ranks listen seconds later. Until then the kernel may give any ephemeral port to a connection of another
    process. It does not use ports below that range, and jobs that start at the same time most likely draw different
    ones. Where no such port is free, the kernel chooses one.
    """
    # Not the generator that a job seeds: jobs with the same seed would draw the same port.
    draw = random.SystemRandom()
    candidates = range(LOWEST_PORT, _ephemeral_start())
    for _ in range(ATTEMPTS if candidates else 0):
        port = draw.choice(candidates)
        if _is_free(port):
            return port
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _ephemeral_start() -> int:
    """The first port that the kernel gives to outgoing connections (Linux; elsewhere Linux's default)."""
    try:
        return int(EPHEMERAL_RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return DEFAULT_EPHEMERAL_START


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError:
            return False
        return True


if __name__ == "__main__":
    print(free_port())
