"""The port that a gateway listens on, alone or with several processes. Nothing here touches Django:
a process that is only beginning reads it.
"""

from __future__ import annotations

import socket
import sys
from typing import Any, Final

BACKLOG: Final = 2048


def listen(host: str, port: int, workers: int) -> socket.socket:
    """Return a socket for `workers` processes to listen with; port 0 takes a free one.

    Raises OSError, or OverflowError for what is no port: another process listens there, say.
    """
    listening = _bound(socket.socket, host, port)
    listening.listen(BACKLOG)
    if workers > 1 and sys.platform == "linux":  # elsewhere they have this one in common
        host, port = listening.getsockname()[:2]
        listening.close()  # nobody else was there: that was to be found out
        listening = _bound(_Reserved, host, port, is_shared=True)
    listening.set_inheritable(True)
    return listening


class _Reserved(socket.socket):
    """An address on which each process that is given this socket listens with one of its own.

    The system shares connections out among those, also such that all come at once. On one socket
    that they have in common, whoever is awake first takes all of them.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _listen_beside_others, self.getsockname()[:2]


def _listen_beside_others(host: str, port: int) -> socket.socket:
    listening = _bound(socket.socket, host, port, is_shared=True)
    listening.listen(BACKLOG)
    return listening


def _bound(
    made_as: type[socket.socket], host: str, port: int, *, is_shared: bool = False
) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    bound = made_as(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if is_shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind(address)
    return bound
