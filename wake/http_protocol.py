"""What the server lets a client send before anybody has looked at it, and how it writes answers.

An application may take requests that are there whole, and answer them later, without a task for
each (`TakesWhole`): to make one, and the coroutines in it, takes longer than to parse the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final, NoReturn, Protocol, cast

from asgiref.typing import ASGI3Application, Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD_BYTES: Final = 64 * 1024

# A request's head must be complete so many seconds after it, or its connection, has begun.
HEAD_SECONDS: Final = 30

_TOO_LARGE: Final = "The request's headers are too large."

# The ASGI extension by which an answer is written whole: its `write` is a `WriteWhole`.
WHOLE_ANSWER: Final = "openclaw.http.response.whole"


class WriteWhole(Protocol):
    """Writes a request's answer, unless it has to be sent as ASGI has it; returns whether it did.

    `head` are header lines (`header_lines`), the body's length among them.
    """

    def __call__(self, scope: Scope, status: int, head: bytes, body: bytes) -> bool: ...


# Writes the answer of a request: status, header lines (the body's length among them), body.
WriteAnswer = Callable[[int, bytes, bytes], None]
# Has a request served by an application as ASGI has it.
Otherwise = Callable[[ASGI3Application], None]


class TakesWhole(Protocol):
    """An ASGI application that is asked first about requests that are there whole."""

    def take_whole(
        self, scope: Scope, body: bytes, answer: WriteAnswer, otherwise: Otherwise
    ) -> bool:
        """Return whether this takes the request: then it calls one of the two, once, later on."""


def header_lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return headers as they are written. They are known to be free of line ends."""
    return b"".join(b"%b: %b\r\n" % header for header in headers)


def _nothing() -> None:
    pass


class BoundedHeadProtocol(HttpToolsProtocol):
    """HTTP/1.1 whose request line and headers may take 64 KiB, and 30 s.

    A larger head is answered 400 and closed (one that does not end, a segment later at most), a
    slower one is closed. The parser has no limit of its own, and takes ever longer over a head that
    does not end. Only GET becomes a WebSocket.
    """

    head_seconds: float = HEAD_SECONDS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_in_head = False
        self._received_bytes = 0  # just now
        # Of the head under way: what was received when it began, what came since then without its
        # end, and whether there was a time between.
        self._first_bytes = self._head_bytes = 0
        self._began_before = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._idle_since: float | None = None
        # The server's own header lines, and the headers that they are: new ones every second.
        self._server_lines = b""
        self._server_headers: Sequence[tuple[bytes, bytes]] = ()
        self._extensions: dict[str, dict[object, object]] = {
            WHOLE_ANSWER: {"write": self._write_whole}
        }
        # Who is asked whether it takes a request; none where answers are logged as ASGI has them.
        self._taker: TakesWhole | None = None
        if not self.access_log and hasattr(self.app, "take_whole"):
            self._taker = self.app
        # The request whose body may come with what is received just now.
        self._unstarted: Any = None
        self._is_receiving = False
        self._serving: Any = None  # the request that is served now

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn does
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_head()
        if self.timeout_keep_alive_task:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None
        # The server tells only the last request, and there may be others before it.
        for cycle in (self._serving, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        if not self.transport.is_closing():  # else it was refused already
            super().send_400_response(msg)

    def _refuse(self, why: str) -> NoReturn:
        """Answer 400, and let the parser take nothing more: its body is no other request's."""
        self.send_400_response(why)
        raise ValueError(why)

    def _measured_head(self) -> int:
        """Return how many bytes a head took, its spaces and line ends about."""
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self.transport.close)

    def _has_head(self) -> None:
        if self._head_timer:
            self._head_timer.cancel()
            self._head_timer = None

    def data_received(self, data: bytes) -> None:
        self._received_bytes = len(data)
        self._is_receiving = True
        try:
            super().data_received(data)
        finally:
            self._is_receiving = False
            if cycle := self._unstarted:
                self._unstarted = None
                self._start_asgi_task(cycle, self.app)
        if not self._is_in_head:
            return
        self._head_bytes += len(data) if self._began_before else 0
        self._began_before = True
        if self._head_bytes > MAX_HEAD_BYTES:
            self.send_400_response(_TOO_LARGE)
        # Most heads come whole: a timer for each would take longer than to parse it.
        elif self.cycle is None or self.cycle.response_complete:
            self._await_head()  # else an answer that is under way would be cut off

    def on_message_begin(self) -> None:
        self._is_in_head = True
        self._first_bytes, self._head_bytes = self._received_bytes, 0
        self._began_before = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._has_head()
        # Where it may be too large it is measured: of what was received, some is not the head.
        most = self._first_bytes + self._head_bytes + self._received_bytes
        if most > MAX_HEAD_BYTES and self._measured_head() > MAX_HEAD_BYTES:
            self._refuse(_TOO_LARGE)
        if self.parser.should_upgrade() and super()._should_upgrade() and not self._is_get():
            self._refuse("Only GET can be upgraded to a WebSocket.")
        super().on_headers_complete()
        self.scope["extensions"] = self._extensions

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._serving = cycle
        if self._is_receiving and self._taker and app is self.app:
            self._unstarted = cycle
        else:
            super()._start_asgi_task(cycle, app)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        cycle: Any = self._unstarted
        if cycle is None or cycle is not self.cycle or self._taker is None:
            return
        if self.flow.write_paused:
            return  # a task waits until what was answered is read
        answer, otherwise = partial(self._answer, cycle), partial(self._start_asgi_task, cycle)
        scope = cast("Scope", cycle.scope)
        if self._taker.take_whole(scope, bytes(cycle.body), answer, otherwise):
            self._unstarted = None

    # One timer for a connection that stays, instead of one for each of its answers.

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since = None

    def on_response_complete(self) -> None:
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        self.flow.resume_reading()
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._await_request(self.timeout_keep_alive)

    def _await_request(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(
            seconds, self.timeout_keep_alive_handler
        )

    def timeout_keep_alive_handler(self) -> None:
        self.timeout_keep_alive_task = None
        if self._idle_since is None:
            return  # the next answer asks again
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._await_request(left)
        else:
            super().timeout_keep_alive_handler()

    def _write_whole(self, scope: Scope, status: int, head: bytes, body: bytes) -> bool:
        cycle = self.cycle
        # Else the next request is here already, or the answer is to be sent in its own time.
        is_next = cycle.scope is scope and not cycle.response_started
        if not is_next or cycle.access_log or cycle.flow.write_paused:
            return False
        self._answer(cycle, status, head, body)
        return True

    def _answer(self, cycle: Any, status: int, head: bytes, body: bytes) -> None:
        """Do what the cycle's `send` does, for an answer that is there whole.

        That takes each header apart and looks whether it may be sent, for every answer anew.
        """
        if cycle.disconnected:
            return
        if cycle.default_headers is not self._server_headers:
            self._server_headers = cycle.default_headers
            self._server_lines = header_lines(cycle.default_headers)
        if not cycle.keep_alive:
            head += b"connection: close\r\n"
        self.transport.write(
            b"%b%b%b\r\n%b" % (STATUS_LINE[status], self._server_lines, head, body)
        )
        cycle.response_started = cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()
        cycle.on_response = _nothing  # else the two know each other until the collector comes

    def _should_upgrade(self) -> bool:
        return super()._should_upgrade() and self._is_get()

    def _is_get(self) -> bool:
        return bool(self.parser.get_method() == b"GET")
