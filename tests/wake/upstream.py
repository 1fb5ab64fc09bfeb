"""A stand-in for another OpenClaw gateway: the handshake and `wake` on a real socket, and mischief.

It serves on the event loop of the test.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

Json = dict[str, Any]
# What to do with a request for which the usual answer is not the thing; the connection is there to
# be misused.
Answer = Callable[[ServerConnection, Json], Awaitable[None]]


class Upstream:
    """`wakes` are the params that it has taken, in the order they came; `connects` all handshakes.

    `answers` holds what to do with the next wakes in place of taking them. While `token` is set,
    another one is refused. `refused_keys` maps a session key to the words that refuse it.
    """

    def __init__(self) -> None:
        self.token = ""
        self.tick_ms: int = 30_000
        self.scopes: object = ["operator.write"]
        self.refused_keys: dict[str, str] = {}
        self.answers: list[Answer] = []
        self.delay = 0.0
        self.connects: list[Json] = []
        self.asked: list[Json] = []
        self.wakes: list[Json] = []
        self.under_way = self.most_under_way = 0
        self.connections: set[ServerConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: Server | None = None
        self._port = 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self._port}/"

    @property
    def texts(self) -> list[str]:
        return [wake["text"] for wake in self.wakes]

    async def start(self) -> None:
        """Listen, on the same port as before."""
        self._server = await serve(self._serve, "127.0.0.1", self._port)
        self._port = next(iter(self._server.sockets)).getsockname()[1]

    async def stop(self) -> None:
        """Go away, and everybody's connection with it."""
        if self._server:
            for connection in list(self.connections):
                connection.transport.abort()
            self._server.close()
            await self._server.wait_closed()
            for task in self._tasks:
                task.cancel()

    async def tell(self, event: str, **payload: object) -> None:
        for connection in list(self.connections):
            await send(connection, {"type": "event", "event": event, "payload": payload, "seq": 2})

    async def _serve(self, connection: ServerConnection) -> None:
        self.connections.add(connection)
        try:
            if await self._shake_hands(connection):
                async for message in connection:
                    task = asyncio.create_task(self._answer(connection, json.loads(message)))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
        except ConnectionClosed:
            pass
        finally:
            self.connections.discard(connection)

    async def _shake_hands(self, connection: ServerConnection) -> bool:
        challenge = {"nonce": str(uuid4()), "ts": 1}
        await send(
            connection,
            {"type": "event", "event": "connect.challenge", "payload": challenge, "seq": 1},
        )
        request = json.loads(await connection.recv())
        assert request["method"] == "connect"
        self.connects.append(request["params"])
        if self.token and request["params"]["auth"].get("token") != self.token:
            words = "unauthorized: gateway token mismatch (provide gateway auth token)"
            details = {"code": "AUTH_TOKEN_MISMATCH"}
            await refuse(connection, request, "INVALID_REQUEST", words, details=details)
            await connection.close(1008, "unauthorized")
            return False
        await accept(
            connection,
            request,
            {
                "type": "hello-ok",
                "protocol": 4,
                "server": {"version": "2026.9.6", "connId": str(uuid4())},
                "auth": {"role": "operator", "scopes": self.scopes},
                "policy": {"maxPayload": 26214400, "tickIntervalMs": self.tick_ms},
            },
        )
        return True

    async def _answer(self, connection: ServerConnection, request: Json) -> None:
        self.asked.append(request["params"])
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await asyncio.sleep(self.delay)
            if self.answers:
                await self.answers.pop(0)(connection, request)
            elif words := self.refused_keys.get(request["params"]["sessionKey"]):
                await refuse(connection, request, "INVALID_REQUEST", words)
            else:
                await self.take(connection, request)
        except ConnectionClosed:
            pass
        finally:
            self.under_way -= 1

    async def take(self, connection: ServerConnection, request: Json) -> None:
        """Take a wake, as it should be."""
        self.wakes.append(request["params"])
        await accept(connection, request, {"ok": True})

    async def take_and_drop(self, connection: ServerConnection, request: Json) -> None:
        """Take a wake and break the connection in place of an answer."""
        self.wakes.append(request["params"])
        connection.transport.abort()


async def send(connection: ServerConnection, frame: object) -> None:
    await connection.send(frame if isinstance(frame, str | bytes) else json.dumps(frame))


async def accept(connection: ServerConnection, request: Json, payload: object) -> None:
    await send(connection, {"type": "res", "id": request["id"], "ok": True, "payload": payload})


async def refuse(
    connection: ServerConnection, request: Json, code: str, message: str, **more: object
) -> None:
    error = {"code": code, "message": message, **more}
    await send(connection, {"type": "res", "id": request["id"], "ok": False, "error": error})


def refuses(code: str, message: str, **more: object) -> Answer:
    """Answer with this error."""

    async def answer(connection: ServerConnection, request: Json) -> None:
        await refuse(connection, request, code, message, **more)

    return answer


def says(*frames: object) -> Answer:
    """Answer with these frames; text as it is, "ID" in an object's `id` is the request's."""

    async def answer(connection: ServerConnection, request: Json) -> None:
        for frame in frames:
            if isinstance(frame, dict) and frame.get("id") == "ID":
                frame = {**frame, "id": request["id"]}
            await send(connection, frame)

    return answer


def closes(code: int, reason: str) -> Answer:
    """Close the connection in place of an answer."""

    async def answer(connection: ServerConnection, request: Json) -> None:
        await connection.close(code, reason)

    return answer


async def hang(connection: ServerConnection, request: Json) -> None:
    """Never answer."""
