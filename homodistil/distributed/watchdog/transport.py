"""Transport of heartbeats: one TCP connection between rank 0 and every other rank, one line per heartbeat.

Not a torch store: a connection tells at once that the process at its other end has died, wherever that runs, and a
store whose server is gone fills the log with C++ stack traces.
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
    """Signs to and from rank 0 (or, on rank 0, all others). Used by one thread; nothing here ever waits.

    Args:
        connections: rank -> connected socket.
    """

    def __init__(self, connections: dict[int, socket.socket]) -> None:
        self._connections = connections
        self._unread = dict.fromkeys(connections, b"")
        for connection in connections.values():
            connection.setblocking(False)

    def send(self, sign: Heartbeat) -> None:
        line = sign.encode().encode() + b"\n"
        for connection in self._connections.values():
            # Refused: the other end is dead, which `receive` finds out, or does not read, which its silence shows.
            with contextlib.suppress(OSError):
                connection.send(line)

    def receive(self) -> tuple[dict[int, Heartbeat], list[int]]:
        """(newest sign of each rank that has sent one, ranks whose connection has ended)."""
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
        """Take what has arrived. Returns whether more may come."""
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
    """Every rank calls it; rank 0 listens on a free port. A token keeps out what else may knock there."""
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
    """The rank at the other end, None for a stranger."""
    connection.settimeout(CONNECT_TIMEOUT_S)
    with contextlib.suppress(OSError, ValueError):
        # Unbuffered: what follows the greeting is for `receive`.
        greeting, rank = connection.makefile("rb", buffering=0).readline(100).decode().split()
        if secrets.compare_digest(greeting, token):
            return int(rank)
    connection.close()
    return None
