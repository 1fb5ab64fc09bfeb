"""Load on `POST /hooks/wake`: in a closed loop, or at a fixed rate.

One thread, plain sockets and one poll for all of them, because a generator that is slower than the
server measures itself. A closed loop sends on each connection as soon as the last answer is there:
it finds the highest rate. At a fixed rate requests are sent whatever the server does, and each
latency counts from when its request was *meant* to be sent: a server that stalls is seen to keep
all those waiting that came meanwhile, and not just those that were under way (coordinated
omission).

Times are of time.monotonic(), in seconds.
"""

from __future__ import annotations

import math
import secrets
import select
import selectors
import socket
import time
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Self
from urllib.parse import urlsplit

import msgspec

# How long after its end a load waits for the answers that are still missing.
GRACE_SECONDS: Final = 10.0
RECEIVE_BYTES: Final = 64 * 1024
EVENT_ID: Final = b'"eventId":"'
NUMBER: Final = b"0000000000"


@dataclass(frozen=True)
class Wakes:
    """What is sent: texts that differ, so that nothing coalesces, to sessions in turn."""

    url: str
    token: str
    sessions: int = 50
    session_prefix: str = "hook:bench:"
    same_text: bool = False

    def requests(self) -> Callable[[], bytes]:
        """Return a function that gives the bytes of the next request."""
        address = urlsplit(self.url)
        run = secrets.token_hex(4)
        parts: list[tuple[bytes, bytes]] = []
        for session in range(self.sessions):
            body = msgspec.json.encode(
                {
                    "text": f"bench {run} {NUMBER.decode()}",
                    "sessionKey": f"{self.session_prefix}{session}",
                }
            )
            head = (
                f"POST {address.path or '/hooks/wake'} HTTP/1.1\r\n"
                f"Host: {address.netloc}\r\n"
                f"Authorization: Bearer {self.token}\r\n"
                f"Content-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            before, after = body.split(NUMBER)
            parts.append((head.encode() + before, after))
        sent = 0

        def following() -> bytes:
            nonlocal sent
            before, after = parts[sent % len(parts)]
            sent += 1
            return b"%b%010d%b" % (before, 0 if self.same_text else sent, after)

        return following


@dataclass
class Outcome:
    """What came of a load. Latencies are in seconds.

    `answered_at` says when each event's answer came, by event id, where that was asked for.
    `unanswered` had no answer when the waiting ended; how long they had waited by then is among
    the latencies, so that a server that answers nothing does not look fast.
    """

    seconds: float = 0
    latencies: array[float] = field(default_factory=lambda: array("d"))
    statuses: Counter[int] = field(default_factory=Counter)
    answered_at: dict[str, float] = field(default_factory=dict)
    broken: int = 0  # the connection ended before the answer
    unanswered: int = 0

    @property
    def rate(self) -> float:
        """Answers with status 200 a second."""
        return self.statuses[200] / self.seconds


@dataclass(eq=False, slots=True)
class _Line:
    """One connection: at most one request under way."""

    sock: socket.socket
    is_busy: bool = False
    began: float = 0  # when the request under way was sent, or meant to be
    answer: bytes = b""


class Load:
    """Connections to one server, and what is sent over them.

    Raises ValueError for a URL that is not http://, OSError when a connection cannot be made.
    """

    def __init__(self, wakes: Wakes, *, connections: int = 32, keep_ids: bool = False) -> None:
        address = urlsplit(wakes.url)
        if address.scheme != "http" or not address.hostname:
            raise ValueError(f"give a URL such as http://127.0.0.1:8000/hooks/wake: {wakes.url}")
        self._address = (address.hostname, address.port or 80)
        self._next_request = wakes.requests()
        self._keep_ids = keep_ids
        self._poll = selectors.DefaultSelector()
        self._outcome = Outcome()
        self._busy = 0
        self._free: list[_Line] = []
        for _ in range(connections):
            self._connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for line in self._lines():
            self._drop(line)
        self._poll.close()

    def closed_loop(self, seconds: float) -> Outcome:
        """Send on every connection as soon as its last answer is there, for so long."""
        return self._run(None, seconds, math.inf)

    def number(self, count: int) -> Outcome:
        """Send `count` requests, each as soon as a connection is free."""
        return self._run(None, math.inf, count)

    def at_rate(self, rate: float, seconds: float) -> Outcome:
        """Send `rate` requests a second; what finds no free connection waits, and that counts."""
        return self._run(rate, seconds, round(rate * seconds))

    # --- The loop -------------------------------------------------------------------------------

    def _run(self, rate: float | None, seconds: float, count: float) -> Outcome:
        """Send until it is time or `count` were sent, then wait for the answers that are missing.

        At a fixed rate request number k (0, 1, …) is meant to be sent at `start + k / rate`, and
        all are sent, however late.
        """
        outcome = self._outcome = Outcome()
        self._receive(0)  # that servers close what has been idle for long is no fault of theirs
        start = now = time.monotonic()
        give_up = start + seconds + GRACE_SECONDS
        sent = 0
        while now < give_up:
            sends = sent < count and (rate is not None or now < start + seconds)
            if not sends and not self._busy:
                break
            due = start + sent / rate if rate else now
            if sends and self._free and due <= now:
                self._send(self._free.pop(), due)
                sent += 1
            else:
                until = due if sends and self._free else give_up
                self._receive(min(until - now, 1.0))
            now = time.monotonic()
        outcome.seconds = now - start
        for line in self._lines():
            if line.is_busy:
                outcome.unanswered += 1
                outcome.latencies.append(now - line.began)
                self._replace(line)
        if rate:
            outcome.unanswered += round(count) - sent
            outcome.latencies.extend(now - start - k / rate for k in range(sent, round(count)))
        return outcome

    def _receive(self, wait: float) -> None:
        """Take what has come; where there is nothing yet, wait for it, but only so long."""
        ready = self._poll.select(0)
        if not ready and wait > 0:
            # The poll's own time-out counts whole milliseconds, which is too coarse for a rate.
            select.select([self._poll], [], [], wait)
            ready = self._poll.select(0)
        for key, _ in ready:
            self._read(key.data)

    def _send(self, line: _Line, began: float) -> None:
        self._busy += 1
        line.is_busy, line.began, line.answer = True, began, b""
        try:
            # It is small and nothing else is under way: the socket takes it whole.
            line.sock.send(self._next_request())
        except OSError:
            self._outcome.broken += 1
            self._replace(line)

    def _read(self, line: _Line) -> None:
        try:
            received = line.sock.recv(RECEIVE_BYTES)
        except OSError:
            received = b""
        if not received:
            self._outcome.broken += line.is_busy
            self._replace(line)
            return
        line.answer = answer = line.answer + received
        head = head_of_whole(answer)
        if head is None:
            return
        now = time.monotonic()
        outcome = self._outcome
        outcome.latencies.append(now - line.began)
        outcome.statuses[int(answer[9:12])] += 1
        if self._keep_ids and (found := answer.find(EVENT_ID)) >= 0:
            begin = found + len(EVENT_ID)
            outcome.answered_at[answer[begin : answer.index(b'"', begin)].decode()] = now
        if b"\r\nconnection: close" in head:
            self._replace(line)
            return
        self._busy -= 1
        line.is_busy = False
        self._free.append(line)

    # --- Connections ----------------------------------------------------------------------------

    def _lines(self) -> list[_Line]:
        return [key.data for key in self._poll.get_map().values()]

    def _connect(self) -> None:
        sock = socket.create_connection(self._address, timeout=10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        line = _Line(sock)
        self._poll.register(sock, selectors.EVENT_READ, line)
        self._free.append(line)

    def _drop(self, line: _Line) -> None:
        self._poll.unregister(line.sock)
        line.sock.close()

    def _replace(self, line: _Line) -> None:
        """Put a new connection in the place of one that is of no more use."""
        if line.is_busy:
            self._busy -= 1
        else:
            self._free.remove(line)
        self._drop(line)
        self._connect()


def head_of_whole(answer: bytes) -> bytes | None:
    """Return the head of an HTTP answer, in lower case, once the answer is there whole."""
    end = answer.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = answer[:end].lower()
    named = head.find(b"\r\ncontent-length:")
    if named >= 0:
        length = int(head[named + 17 :].split(b"\r\n", 1)[0])
        return head if len(answer) >= end + 4 + length else None
    is_chunked = b"\r\ntransfer-encoding: chunked" in head
    return None if is_chunked and not answer.endswith(b"0\r\n\r\n") else head
