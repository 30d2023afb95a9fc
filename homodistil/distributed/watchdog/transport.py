"""Transport of heartbeats: one TCP connection between rank 0 and every other rank, one line per heartbeat.

This is not a torch store, because a connection ends at once if the process at its other end dies, on any machine, while
a store without its server fills the log with C++ stack traces.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket

from homodistil.distributed import ranks
from homodistil.distributed.watchdog.heartbeat import Heartbeat

CONNECT_TIMEOUT_S = 120.0
_RECEIVE_BYTES = 1 << 16


class Channel:
    """Sends and receives heartbeats: to and from rank 0 or, on rank 0, all other ranks. Never blocks.

    An instance is used by one thread only.

    Args:
        connections: rank -> connected socket.
    """

    def __init__(self, connections: dict[int, socket.socket]) -> None:
        self._connections = connections
        self._unread = dict.fromkeys(connections, b"")
        for connection in connections.values():
            connection.setblocking(False)

    def send(self, sign: Heartbeat) -> None:
        """Send a heartbeat over all connections."""
        line = sign.encode().encode() + b"\n"
        for connection in self._connections.values():
            # If this fails, the other end is dead (`receive` will notice it) or hangs (then it sends no heartbeats).
            with contextlib.suppress(OSError):
                connection.send(line)

    def receive(self) -> tuple[dict[int, Heartbeat], list[int]]:
        """(newest heartbeat of each rank that has sent one since the last call, ranks whose connection has ended)."""
        signs, ended = {}, []
        for rank, connection in list(self._connections.items()):
            is_open = self._fill(rank, connection)
            *lines, self._unread[rank] = self._unread[rank].split(b"\n")
            if lines:
                signs[rank] = Heartbeat.decode(lines[-1])
            if not is_open:
                ended.append(rank)
                self._connections.pop(rank).close()
        return signs, ended

    def _fill(self, rank: int, connection: socket.socket) -> bool:
        """Read all bytes that have arrived. Returns whether the connection is still open."""
        try:
            while received := connection.recv(_RECEIVE_BYTES):
                self._unread[rank] += received
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()


def connect() -> Channel:
    """Connect all ranks to rank 0, which listens on a free port. Every rank calls it.

    A random token identifies the ranks of this job, so that other programs cannot connect.
    """
    listener = _listener() if ranks.rank() == 0 else None
    port, token = ranks.on_rank_zero(lambda: (listener.getsockname()[1], secrets.token_hex(16)))
    if listener is None:
        connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=CONNECT_TIMEOUT_S)
        connection.sendall(f"{token} {ranks.rank()}\n".encode())
        return Channel({0: connection})
    connections: dict[int, socket.socket] = {}
    with listener:
        while len(connections) < ranks.world_size() - 1:
            connection, _ = listener.accept()
            if rank := _greeted(connection, token):
                connections[rank] = connection
    return Channel(connections)


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    else:
        listener = socket.create_server(("", 0), backlog=1024)
    listener.settimeout(CONNECT_TIMEOUT_S)
    return listener


def _greeted(connection: socket.socket, token: str) -> int | None:
    """The rank at the other end; None, and the connection is closed, if it does not send the token."""
    connection.settimeout(CONNECT_TIMEOUT_S)
    with contextlib.suppress(OSError, ValueError):
        # Unbuffered, because the data after the greeting is for `receive`.
        greeting, rank = connection.makefile("rb", buffering=0).readline(100).decode().split()
        if secrets.compare_digest(greeting, token):
            return int(rank)
    connection.close()
    return None
