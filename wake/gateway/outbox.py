"""What is still to be sent on one connection: in order, and never more than a limit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from wake.gateway.handshake import CLOSE_POLICY_VIOLATION

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]

SLOW_CONSUMER: Final = "slow consumer"


class Outbox:
    """Takes frames at once and hands them to the server as fast as the client reads.

    A client that does not read fills it up; over `limit` characters its connection is dropped:
    by `drop(code, reason)`, which waits for nothing, where the server has such a thing.
    After a close nothing more is taken.
    """

    def __init__(
        self,
        send: Callable[[Message], Awaitable[None]],
        limit: int,
        drop: Callable[[int, str], None] | None = None,
    ) -> None:
        self._send = send
        self._limit = limit
        self._drop = drop
        self._buffered = 0
        self._closed = False
        self._messages: asyncio.Queue[Message] = asyncio.Queue()

    @property
    def closed(self) -> bool:
        """Whether the connection is closing: nothing that is put in now is sent."""
        return self._closed

    def put(self, text: str) -> None:
        """Send a text frame after those that were put in before."""
        if self._closed:
            return
        self._buffered += len(text)
        if self._buffered > self._limit:
            # What waits is given up: the client is to hear of the end, not of the past.
            self._messages = asyncio.Queue()
            self.close(CLOSE_POLICY_VIOLATION, SLOW_CONSUMER)
            if self._drop:
                self._drop(CLOSE_POLICY_VIOLATION, SLOW_CONSUMER)
            return
        self._messages.put_nowait({"type": "websocket.send", "text": text})

    def close(self, code: int, reason: str) -> None:
        """Close the connection after what was put in before. Only the first close counts."""
        if self._closed:
            return
        self._closed = True
        self._messages.put_nowait({"type": "websocket.close", "code": code, "reason": reason})

    async def run(self) -> None:
        """Send until the close is sent or the client is gone."""
        while True:
            message = await self._messages.get()
            try:
                await self._send(message)
            except OSError as error:  # the client went away; its disconnect is on its way to us
                logger.debug("gateway: could not send: %s", error)
                self._closed = True
                return
            if message["type"] == "websocket.close":
                return
            self._buffered -= len(message["text"])
