"""Checks that MASTER_PORT, at which the ranks join, is free. Called before they join."""

from __future__ import annotations

import errno
import os
import socket

from homodistil.preflight.findings import Findings


def check_port(findings: Findings) -> None:
    """Check the port on rank 0, which will listen on it, unless torchrun listens already. Other ranks check nothing."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if address is None or port is None or os.environ.get("RANK", "0") != "0":
        return
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", int(port)))
            probe.listen()
    except (OSError, ValueError, OverflowError) as error:
        is_taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        reason = "another process listens there" if is_taken else str(error)
        fix = "end the other job, or choose another port (deepspeed --master_port, MASTER_PORT)"
        findings.refuse("port", f"{address}:{port} cannot be listened on ({reason})", fix)
