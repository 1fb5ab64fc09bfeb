"""One WebSocket connection: the challenge, the handshake, then requests side by side."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final, ParamSpec, TypeVar, cast
from uuid import uuid4

import msgspec
from channels.consumer import AsyncConsumer  # type: ignore[import-untyped]
from channels.exceptions import StopConsumer  # type: ignore[import-untyped]
from django.conf import settings
from django.http import parse_cookie
from django.utils import timezone

from wake import status
from wake.gateway import (
    credentials,
    device_proof,
    frames,
    handshake,
    hub,
    methods,
    presence,
    scopes,
)
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
from wake.heartbeats.runners import Lost, Outcome, Returned, inbox
from wake.threads import call_in
from wake.websocket_protocol import EXTENSION, Control

logger = logging.getLogger(__name__)

CLOSE_TOO_BIG: Final = 1009
CLOSE_SERVICE_RESTART: Final = 1012
CLOSE_TRY_AGAIN_LATER: Final = 1013
# A close frame holds at most 123 bytes of reason.
MAX_REASON_CHARACTERS: Final = 120
MAX_REQUESTS_IN_FLIGHT: Final = 64
DATABASE_THREADS: Final = 12
# One connection's requests take no more of the threads than this at a time.
THREADS_EACH: Final = 4
# What becomes of the heartbeats that a client has when its connection ends.
CLIENT_GONE: Final = Lost("the connection of its client ended")

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

    # No channel layer: what is told comes from the database, through the hub, and what a connection
    # does not use (Redis, it may be) cannot end it.
    channel_layer_alias = ""

    caller: Caller
    report: presence.Report | None = None

    def __init__(
        self,
        *,
        handshake_seconds: float = frames.HANDSHAKE_SECONDS,
        tick_seconds: float = frames.TICK_SECONDS,
        max_buffered_bytes: int = frames.MAX_BUFFERED_BYTES,
    ) -> None:
        self._handshake_seconds = handshake_seconds
        self._tick_seconds = tick_seconds
        self._max_buffered_bytes = max_buffered_bytes
        self._id = str(uuid4())
        self._nonce = str(uuid4())
        self._sequence = 0
        self._is_known = False
        self._turns = asyncio.Semaphore(THREADS_EACH)
        self._requests: set[asyncio.Task[None]] = set()
        self._companions: list[asyncio.Task[None]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self._control: Control | None = scope.get("extensions", {}).get(EXTENSION)
        drop = self._control.drop if self._control else None
        self._hub = hub.of_this_loop()
        self._inbox = inbox.of_this_loop()
        self._outbox = Outbox(send, self._max_buffered_bytes, drop)
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._hub.remove(self)
            tasks = [*self._requests, *self._companions]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # Last: one of the requests may have attached it until now.
            self._inbox.leave(self._id, CLIENT_GONE)

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
        self.tell("connect.challenge", {"nonce": self._nonce, "ts": _now_ms()})

    async def websocket_receive(self, message: dict[str, Any]) -> None:
        """Take one frame: a part of the handshake, or a request."""
        if self._outbox.closed:
            return
        text = message.get("text")
        data = text.encode() if text is not None else message.get("bytes") or b""
        limit = frames.MAX_PAYLOAD_BYTES if self._is_known else frames.MAX_HANDSHAKE_BYTES
        if len(data) > limit:
            self.end(CLOSE_TOO_BIG, f"frame over {limit} bytes")
        elif self._is_known:
            self._take_request(data, is_text=text is not None)
        else:
            await self._shake_hands(data, is_text=text is not None)

    async def websocket_shutdown(self, message: dict[str, Any]) -> None:
        """Say why it ends here: the process is asked to stop."""
        if self._is_known:
            self.tell("shutdown", {"reason": "the gateway stops"})
        self.end(CLOSE_SERVICE_RESTART, "service restart", Returned())

    async def websocket_disconnect(self, message: dict[str, Any]) -> None:
        raise StopConsumer

    async def _end_without_handshake(self) -> None:
        await asyncio.sleep(self._handshake_seconds)
        if not self._is_known:
            self.end(CLOSE_POLICY_VIOLATION, "handshake timeout")

    async def _tick(self) -> None:
        """Tell the client regularly that the gateway is there."""
        while not self._outbox.closed:
            await asyncio.sleep(self._tick_seconds)
            self.tell("tick", {"ts": _now_ms()})

    # --- The handshake --------------------------------------------------------------------------

    async def _shake_hands(self, data: bytes, *, is_text: bool) -> None:
        """Answer the first frame: with hello-ok, or with why not and a close."""
        if not is_text:
            self.end(CLOSE_POLICY_VIOLATION, "binary frames are not supported")
            return
        try:
            request = decode_request(data)
        except NotJson:
            self.end(CLOSE_POLICY_VIOLATION, "not JSON")
            return
        except InvalidFrame as error:
            message = f"invalid request frame: {error}"
            if error.id != frames.UNKNOWN_ID:  # else there is nothing to answer on
                self._fail(error.id, Error(code="INVALID_REQUEST", message=message))
            self.end(CLOSE_POLICY_VIOLATION, message)
            return
        try:
            await self._say_hello(request)
        except HandshakeRefused as refused:
            logger.info("gateway: connection %s refused: %s", self._id, str(refused))
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
        origin, host = self._header(b"origin"), self._header(b"host") or ""
        handshake.check_origin(origin, host)
        device_proof.verify(params, nonce=self._nonce, now_ms=_now_ms())
        credential = await in_database(
            credentials.authenticate,
            params.auth,
            self._session_key() if handshake.is_own_page(origin, host) else "",
            timezone.now(),
        )
        granted = scopes.grant(params.scopes, credential.scopes)
        await self._hub.ready()
        hello = frames.HelloOk(
            protocol=protocol,
            server=frames.Server(version=status.version(), conn_id=self._id),
            features=frames.Features(methods=sorted(methods.METHODS), events=list(frames.EVENTS)),
            snapshot=await self._hub.snapshot(),
            auth=frames.Granted(role=params.role, scopes=granted, name=credential.name),
            policy=frames.Policy(
                max_buffered_bytes=self._max_buffered_bytes,
                tick_interval_ms=int(self._tick_seconds * 1000),
            ),
        )
        logger.info(
            "gateway: connection %s of %s with %s",
            self._id,
            params.client.id[:100],
            credential.name,
        )
        if not scopes.includes(granted, scopes.READ):
            hello.snapshot = msgspec.structs.replace(hello.snapshot, presence=[], health={})
        if self._control:
            self._control.limit_messages(frames.MAX_PAYLOAD_BYTES)
        self._answer(request.id, hello)
        # From here on, what it was not granted may be lost without an end.
        self.caller = Caller(self._id, replace(credential, scopes=granted), granted, link=self)
        self.report = presence.of_client(params, self._id, self._address(), granted)
        self._is_known = True
        self._hub.add(self)
        self._accompany(self._tick())

    def _session_key(self) -> str:
        cookies = parse_cookie(self._header(b"cookie") or "")
        return cookies.get(settings.SESSION_COOKIE_NAME, "")

    def _address(self) -> str:
        client = self.scope.get("client")
        return str(client[0]) if client else ""

    def _header(self, name: bytes) -> str | None:
        return next(
            (value.decode("latin-1") for key, value in self.scope["headers"] if key == name), None
        )

    # --- Requests -------------------------------------------------------------------------------

    def _take_request(self, data: bytes, *, is_text: bool) -> None:
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
        task = asyncio.create_task(self._serve(request))
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)

    async def _serve(self, request: Request) -> None:
        wanted = methods.METHODS.get(request.method)
        try:
            if wanted and wanted.is_on_loop:
                payload = await cast("Awaitable[object]", methods.call(request, self.caller))
            else:
                payload = await self.in_database(methods.call, request, self.caller)
            self._answer(request.id, payload)
        except Exception as error:
            self._fail(request.id, methods.to_error(error))

    async def in_database(
        self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call a function that uses the database, on one of the threads this connection may use."""
        async with self._turns:
            return await in_database(function, *args, **kwargs)

    # --- Sending --------------------------------------------------------------------------------

    def _accompany(self, companion: Coroutine[Any, Any, None]) -> None:
        """Run something beside the connection, to its end at the latest."""
        self._companions.append(asyncio.create_task(companion))

    def _answer(self, request_id: str, payload: object) -> None:
        self._put(Response(id=request_id, ok=True, payload=payload))

    def _fail(self, request_id: str, error: Error) -> None:
        self._put(Response(id=request_id, ok=False, error=error))

    def tell(self, event: str, payload: object) -> None:
        """Send an event; a payload that is encoded already is `msgspec.Raw`."""
        self._sequence += 1
        self._put(Event(event=event, payload=payload, seq=self._sequence))

    def _put(self, frame: frames.Frame) -> None:
        self._outbox.put(frames.encode(frame))

    def _refuse(self, request_id: str, error: Error, close_code: int) -> None:
        self._fail(request_id, error)
        self.end(close_code, error.message)

    def end(self, code: int, reason: str, runs: Outcome = CLIENT_GONE) -> None:
        """Close the connection after what was sent before. Only the first close counts.

        The heartbeats that the client has end as `runs` says, at once.
        """
        self._inbox.leave(self._id, runs)
        self._outbox.close(
            code, ascii(reason[:MAX_REASON_CHARACTERS])[1:-1][:MAX_REASON_CHARACTERS]
        )


def _now_ms() -> int:
    return status.milliseconds(timezone.now())
