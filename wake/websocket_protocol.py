"""What the server does with a WebSocket beyond ASGI: size by trust, parting words, not waiting."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

# The key of `Control` among the extensions of a connection's scope.
EXTENSION: Final = "openclaw.control"
# A close is given up so long after it was sent to a client that does not read.
CLOSE_SECONDS: Final = 10.0
# How long parting words may take to be sent before the connection is closed anyway.
PARTING_SECONDS: Final = 2.0


def _is_no_fault_of_a_client(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Invalid UTF-8 sequence")


def _name_no_query(record: logging.LogRecord) -> bool:
    if "WebSocket" in str(record.msg) and isinstance(record.args, tuple):
        record.args = tuple(
            value.partition("?")[0] if isinstance(value, str) else value for value in record.args
        )
    return True


# Anybody can send such bytes, as often as they like; uvicorn logs a traceback each time.
logging.getLogger("uvicorn.error").addFilter(_is_no_fault_of_a_client)
# It logs the address of each connection, and clients put tokens into theirs.
logging.getLogger("uvicorn.error").addFilter(_name_no_query)


@dataclass(frozen=True, slots=True)
class Control:
    """What the application may do with its connection that ASGI has no message for.

    `limit_messages(size)` sets how many bytes a message may have; a larger one ends the connection
    with 1009 before it is read whole. `drop(code, reason)` closes without waiting for the client to
    read what was sent before. Both are called on the event loop.
    """

    limit_messages: Callable[[int], None]
    drop: Callable[[int, str], None]


class GatewayWebSocketProtocol(WebSocketsSansIOProtocol):
    """A WebSocket whose scope has `Control` among its extensions.

    Before a stop the application receives `websocket.shutdown`, so that it can say why.
    """

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if hasattr(self, "scope"):  # the handshake was good
            control = Control(self._limit_messages, self._drop)
            self.scope["extensions"] = {**(self.scope["extensions"] or {}), EXTENSION: control}  # type: ignore[dict-item] # ASGI lets servers add their own

    def _limit_messages(self, size: int) -> None:
        self.conn.max_message_size = size

    def _drop(self, code: int, reason: str) -> None:
        if self.close_sent or self.transport.is_closing():
            return
        self.conn.send_close(code, reason)
        self._part(code, reason)

    def handle_parser_exception(self) -> None:
        """Say what was wrong, and read on until the client has seen it.

        A socket that is closed with data unread is reset, and a client that is still sending would
        lose the close code. What comes now is thrown away.
        """
        if self.close_sent:
            return
        assert self.conn.close_sent is not None  # noqa: S101 - the parser has failed
        self._part(self.conn.close_sent.code, self.conn.close_sent.reason)
        self.transport.write_eof()

    def _part(self, code: int, reason: str) -> None:
        """Send the close that is prepared, tell the application, and give the client a while."""
        self.stop_keepalive()
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        # Else its reply to the close would not be read.
        self.transport.resume_reading()
        self.close_timer = self.loop.call_later(CLOSE_SECONDS, self.transport.abort)

    def keepalive_timeout(self) -> None:
        """Drop a client that answers no ping: nothing that is written to it may be waited for."""
        super().keepalive_timeout()
        self.loop.call_later(CLOSE_SECONDS, self.transport.abort)

    def shutdown(self) -> None:
        """Let the application say its parting words and close; see to it that it ends."""
        if not self.handshake_complete or self.close_sent:
            super().shutdown()
            return
        self.stop_keepalive()
        parting: Any = {"type": "websocket.shutdown"}
        self.queue.put_nowait(parting)
        self.loop.call_later(PARTING_SECONDS, self._end)

    def _end(self) -> None:
        if not self.disconnected:
            super().shutdown()
            self.transport.abort()
