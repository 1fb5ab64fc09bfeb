"""Several processes on one port: each listens with a socket of its own, and gets its share."""

from __future__ import annotations

import contextlib
import pickle
import socket
import sys
from collections.abc import Iterator

import pytest

from wake.listening import listen

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere the processes have one socket in common"
)

HOST = "127.0.0.1"
CONNECTIONS = 64


@contextlib.contextmanager
def workers(reserved: socket.socket, count: int) -> Iterator[list[socket.socket]]:
    """Open what each of the processes does that are given the socket."""
    with contextlib.ExitStack() as stack:
        given = [pickle.loads(pickle.dumps(reserved)) for _ in range(count)]  # noqa: S301 - ours
        yield [stack.enter_context(one) for one in given]


def accepted(listening: socket.socket) -> int:
    """Return how many connections wait at a socket, and close them."""
    listening.setblocking(False)
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            listening.accept()[0].close()
            count += 1
    return count


def connect_often(port: int) -> None:
    for _ in range(CONNECTIONS):
        socket.create_connection((HOST, port), 10).close()


def test_connections_that_come_at_once_are_shared_out() -> None:
    with listen(HOST, 0, 2) as reserved:
        port = reserved.getsockname()[1]
        with workers(reserved, 2) as (one, other):
            connect_often(port)
            counts = accepted(one), accepted(other)
            assert sum(counts) == CONNECTIONS
            assert min(counts) > CONNECTIONS // 8
            one.close()
            connect_often(port)
            assert accepted(other) == CONNECTIONS, "nobody waits for one that is gone"


def test_a_second_start_by_mistake_finds_the_port_taken() -> None:
    with listen(HOST, 0, 2) as reserved, workers(reserved, 2):
        for count in (1, 2):
            with pytest.raises(OSError, match="in use"):
                listen(HOST, reserved.getsockname()[1], count)


def test_one_process_listens_at_once_and_alone() -> None:
    with listen(HOST, 0, 1) as listening:
        port = listening.getsockname()[1]
        socket.create_connection((HOST, port), 10).close()
        with pytest.raises(OSError, match="in use"):
            listen(HOST, port, 2)
