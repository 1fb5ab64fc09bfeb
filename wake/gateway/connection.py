"""One WebSocket connection: the challenge, the handshake, then requests side by side."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, ParamSpec, TypeVar
from uuid import uuid4

from channels.consumer import AsyncConsumer  # type: ignore[import-untyped]
from channels.exceptions import StopConsumer  # type: ignore[import-untyped]
from django.db import DatabaseError
from django.utils import timezone

from wake import configuration, status
from wake.gateway import device_proof, frames, handshake, methods, presence, scopes
from wake.gateway.frames import (
    Error,
    Event,
    InvalidFrame,
    NotJson,
    Request,
    Response,
    decode_params,
    decode_request,
)
from wake.gateway.handshake import CLOSE_POLICY_VIOLATION, HandshakeRefused
from wake.gateway.methods import Caller
from wake.gateway.outbox import Outbox
from wake.threads import call_in

logger = logging.getLogger(__name__)

CLOSE_TOO_BIG: Final = 1009
CLOSE_TRY_AGAIN_LATER: Final = 1013
# A close frame holds at most 123 bytes of reason.
MAX_REASON_CHARACTERS: Final = 120
CREDENTIAL_ENDED: Final = "unauthorized: gateway token revoked or expired"
MAX_REQUESTS_IN_FLIGHT: Final = 64
DATABASE_THREADS: Final = 8

# Methods wait for the database here, never on the event loop, and not on the one thread that
# Django shares among all its synchronous views.
_database_threads = ThreadPoolExecutor(DATABASE_THREADS, thread_name_prefix="gateway-database")

P = ParamSpec("P")
T = TypeVar("T")


async def in_database(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function that uses the database on a thread of the gateway's own."""
    return await call_in(_database_threads, function, *args, **kwargs)


class Connection(AsyncConsumer):  # type: ignore[misc]
    """A client of the gateway protocol.

    The first request must be `connect`; what comes before its answer is handled in turn. From then
    on every request is a task of its own, so that a slow one holds up no other, and answers may
    come out of order.
    """

    # No channel layer: nothing is broadcast yet, and what a connection does not use (Redis, it may
    # be) cannot end it.
    channel_layer_alias = ""

    def __init__(
        self,
        *,
        handshake_seconds: float = frames.HANDSHAKE_SECONDS,
        tick_seconds: float = frames.TICK_SECONDS,
    ) -> None:
        self._handshake_seconds = handshake_seconds
        self._tick_seconds = tick_seconds
        self._id = str(uuid4())
        self._nonce = str(uuid4())
        self._sequence = 0
        self._caller: Caller | None = None
        self._requests: set[asyncio.Task[None]] = set()
        self._companions: list[asyncio.Task[None]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self._outbox = Outbox(send, frames.MAX_BUFFERED_BYTES)
        try:
            await super().__call__(scope, receive, send)
        finally:
            tasks = [*self._requests, *self._companions]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def dispatch(self, message: dict[str, Any]) -> None:
        """Handle a message of the server or of the channel layer.

        Unlike Channels' own, this does not first visit Django's thread to close old database
        connections: a consumer that uses none there would wait for nothing.
        """
        handler = getattr(self, message["type"].replace(".", "_"))
        await handler(message)

    # --- The life of a connection ---------------------------------------------------------------

    async def websocket_connect(self, message: dict[str, Any]) -> None:
        await self.send({"type": "websocket.accept"})
        self._accompany(self._outbox.run())
        self._accompany(self._end_without_handshake())
        self._tell(
            "connect.challenge",
            {"nonce": self._nonce, "ts": status.milliseconds(timezone.now())},
        )

    async def websocket_receive(self, message: dict[str, Any]) -> None:
        """Take one frame: a part of the handshake, or a request."""
        if self._outbox.closed:
            return
        text = message.get("text")
        data = text.encode() if text is not None else message.get("bytes") or b""
        limit = frames.MAX_PAYLOAD_BYTES if self._caller else frames.MAX_HANDSHAKE_BYTES
        if len(data) > limit:
            self._close(CLOSE_TOO_BIG, f"frame over {limit} bytes")
        elif self._caller is None:
            await self._shake_hands(data, is_text=text is not None)
        else:
            self._take_request(data, self._caller, is_text=text is not None)

    async def websocket_disconnect(self, message: dict[str, Any]) -> None:
        raise StopConsumer

    async def _end_without_handshake(self) -> None:
        await asyncio.sleep(self._handshake_seconds)
        if self._caller is None:
            self._close(CLOSE_POLICY_VIOLATION, "handshake timeout")

    async def _tick(self, caller: Caller) -> None:
        """Tell the client regularly that the gateway is there, while it may be told anything."""
        while not self._outbox.closed:
            await asyncio.sleep(self._tick_seconds)
            self._tell("tick", {"ts": status.milliseconds(timezone.now())})
            with contextlib.suppress(DatabaseError):  # not known now: the next request asks again
                if not await in_database(handshake.is_in_force, caller.credential, timezone.now()):
                    self._close(CLOSE_POLICY_VIOLATION, CREDENTIAL_ENDED)

    # --- The handshake --------------------------------------------------------------------------

    async def _shake_hands(self, data: bytes, *, is_text: bool) -> None:
        """Answer the first frame: with hello-ok, or with why not and a close."""
        if not is_text:
            self._close(CLOSE_POLICY_VIOLATION, "binary frames are not supported")
            return
        try:
            request = decode_request(data)
        except NotJson:
            self._close(CLOSE_POLICY_VIOLATION, "not JSON")
            return
        except InvalidFrame as error:
            message = f"invalid request frame: {error}"
            if error.id != frames.UNKNOWN_ID:  # else there is nothing to answer on
                self._fail(error.id, Error(code="INVALID_REQUEST", message=message))
            self._close(CLOSE_POLICY_VIOLATION, message)
            return
        try:
            await self._say_hello(request)
        except HandshakeRefused as refused:
            logger.info("gateway: connection %s refused: %s", self._id, refused)
            self._refuse(request.id, refused.error, refused.close_code)
        except Exception as error:
            self._refuse(request.id, methods.to_error(error), CLOSE_TRY_AGAIN_LATER)

    async def _say_hello(self, request: Request) -> None:
        """Check a first request and take the connection.

        Raises HandshakeRefused, and DatabaseError when credentials or state cannot be read.
        """
        if request.method != "connect":
            raise HandshakeRefused("invalid handshake: first request must be connect")
        try:
            params = decode_params(request.params, frames.ConnectParams)
        except InvalidFrame as error:
            raise HandshakeRefused(f"invalid connect params: {error}") from None
        protocol = handshake.agree_on_protocol(params)
        handshake.check_origin(self._header(b"origin"), self._header(b"host") or "")
        device_proof.verify(params, nonce=self._nonce, now_ms=int(time.time() * 1000))
        credential = await in_database(handshake.authenticate, params.auth, timezone.now())
        granted = scopes.grant(params.scopes, credential.scopes)
        hello = frames.HelloOk(
            protocol=protocol,
            server=frames.Server(version=status.version(), conn_id=self._id),
            features=frames.Features(methods=sorted(methods.METHODS), events=frames.EVENTS),
            snapshot=await in_database(_snapshot),
            auth=frames.Granted(role=params.role, scopes=granted),
            policy=frames.Policy(tick_interval_ms=int(self._tick_seconds * 1000)),
        )
        logger.info(
            "gateway: connection %s of %s with %s",
            self._id,
            params.client.id[:100],
            credential.name,
        )
        self._answer(request.id, hello)
        self._caller = caller = Caller(self._id, credential, granted)
        self._accompany(self._tick(caller))

    def _header(self, name: bytes) -> str | None:
        return next(
            (value.decode("latin-1") for key, value in self.scope["headers"] if key == name), None
        )

    # --- Requests -------------------------------------------------------------------------------

    def _take_request(self, data: bytes, caller: Caller, *, is_text: bool) -> None:
        """Start the task that answers a frame, or refuse it at once; the connection stays."""
        try:
            if not is_text:
                raise InvalidFrame("binary frames are not supported")
            request = decode_request(data)
        except InvalidFrame as error:
            message = f"invalid request frame: {error}"
            self._fail(error.id, Error(code="INVALID_REQUEST", message=message))
            return
        if len(self._requests) >= MAX_REQUESTS_IN_FLIGHT:
            self._fail(request.id, methods.TOO_MANY_REQUESTS)
            return
        task = asyncio.create_task(self._serve(request, caller))
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)

    async def _serve(self, request: Request, caller: Caller) -> None:
        try:
            self._answer(request.id, await in_database(_call, request, caller))
        except HandshakeRefused as refused:
            self._refuse(request.id, refused.error, refused.close_code)
        except Exception as error:
            self._fail(request.id, methods.to_error(error))

    # --- Sending --------------------------------------------------------------------------------

    def _accompany(self, companion: Coroutine[Any, Any, None]) -> None:
        """Run something beside the connection, to its end at the latest."""
        self._companions.append(asyncio.create_task(companion))

    def _answer(self, request_id: str, payload: object) -> None:
        self._put(Response(id=request_id, ok=True, payload=payload))

    def _fail(self, request_id: str, error: Error) -> None:
        self._put(Response(id=request_id, ok=False, error=error))

    def _tell(self, event: str, payload: object) -> None:
        self._sequence += 1
        self._put(Event(event=event, payload=payload, seq=self._sequence))

    def _put(self, frame: frames.Frame) -> None:
        self._outbox.put(frames.encode(frame))

    def _refuse(self, request_id: str, error: Error, close_code: int) -> None:
        self._fail(request_id, error)
        self._close(close_code, error.message)

    def _close(self, code: int, reason: str) -> None:
        self._outbox.close(
            code, ascii(reason[:MAX_REASON_CHARACTERS])[1:-1][:MAX_REASON_CHARACTERS]
        )


def _call(request: Request, caller: Caller) -> object:
    """Call a method for a caller whose credential is still in force; else HandshakeRefused."""
    if not handshake.is_in_force(caller.credential, timezone.now()):
        raise HandshakeRefused(CREDENTIAL_ENDED)
    return methods.call(request, caller)


def _snapshot() -> frames.Snapshot:
    """Return what a client is told at its start. Reads the database."""
    settings = configuration.gateway()
    health = status.health()
    nodes = presence.entries()
    return frames.Snapshot(
        presence=nodes,
        health=health,
        # Times of the newest change: they grow, and are the same in all processes.
        state_version=frames.StateVersion(
            presence=max((node["ts"] for node in nodes), default=0), health=health["ts"]
        ),
        uptime_ms=status.uptime_ms(),
        session_defaults=frames.SessionDefaults(
            default_agent_id=settings.default_agent,
            main_key=settings.main_key,
            main_session_key=settings.main_session(settings.default_agent).key,
            scope=methods.wire_scope(settings.scope),
        ),
    )
