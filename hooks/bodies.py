"""The body of a hook: how much of it is read, and what it must be."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

import msgspec
from asgiref.typing import (
    ASGI3Application,
    ASGIReceiveCallable,
    ASGIReceiveEvent,
    ASGISendCallable,
    ASGISendEvent,
    HTTPRequestEvent,
    Scope,
)
from django.conf import settings
from rest_framework.request import Request

from hooks.configuration import hooks
from hooks.errors import BodyTooLarge, PayloadError

MAX_OTHER_BODY_BYTES: Final = settings.DATA_UPLOAD_MAX_MEMORY_SIZE

# A body must be complete so many seconds after its request's head; then it is answered with 408.
BODY_SECONDS: Final = 30
# A client that is still sending when it is answered has so long, at least, to read the answer.
LINGER_SECONDS: Final = 1

_NOTHING: Final[HTTPRequestEvent] = {"type": "http.request", "body": b"", "more_body": False}
_CLOSE: Final = (b"connection", b"close")


class BodyLimit:
    """ASGI application around Django's: takes no more of a body than may be, nor waits for ever.

    For a hook the limit is what the policy allows, for all else what Django takes into memory.
    Django stores a body whole before any view sees the request. Here the rest of one that is too
    large is kept from it, and what was read is handed over as if it ended there, one byte over the
    limit; the view, which knows whether the credential is right, then refuses it (`read_body`).

    A request whose body is not complete after `seconds` is answered here, with 408.
    """

    def __init__(self, application: ASGI3Application, seconds: float = BODY_SECONDS) -> None:
        self._application = application
        self._seconds = seconds

    async def __call__(
        self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        is_hook = hooks().relative_path(path) is not None
        limit = hooks().max_body_bytes if is_hook else MAX_OTHER_BODY_BYTES
        announced = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
        exchange = _Exchange(
            receive, send, 0 if _is_over(announced, limit) else limit + 1, self._seconds
        )
        await self._application(scope, exchange.receive, exchange.send)
        await exchange.finish()


class _Exchange:
    """One request and its answer, between the server and the application.

    The body is cut off after `most` bytes. After the cut the application receives nothing: if it
    waits for the client to leave, it waits until it is cancelled. A body that is not complete
    after `seconds` ends, for the application, as if the client had left.
    """

    def __init__(
        self, receive: ASGIReceiveCallable, send: ASGISendCallable, most: int, seconds: float
    ) -> None:
        self._receive = receive
        self._send = send
        self._left = most
        self._seconds = seconds
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._is_cut = False
        self._is_complete = False  # the client has sent all, or has left
        self._is_late = False
        self._is_started = False  # the answer
        self._is_held = False  # the answer's end

    async def receive(self) -> ASGIReceiveEvent:
        """Receive the next part of the body, and after the last one that the client has left."""
        if self._is_cut:
            await asyncio.get_running_loop().create_future()
        if self._left == 0:
            self._is_cut = True
            return _NOTHING
        try:
            event = await self._receive_in_time()
        except TimeoutError:
            self._is_late = True
            return {"type": "http.disconnect"}
        if event["type"] != "http.request":
            return event
        part = event.get("body", b"")[: self._left]
        self._left -= len(part)
        self._is_cut = self._left == 0
        more = not self._is_complete and not self._is_cut
        return {"type": "http.request", "body": part, "more_body": more}

    async def send(self, event: ASGISendEvent) -> None:
        """Send the next part of the answer.

        While the client may still be sending what nobody takes, the answer's end is held back: the
        server closes the connection then.
        """
        is_cut_short = self._is_cut and not self._is_complete
        if event["type"] == "http.response.start":
            self._is_started = True
            if is_cut_short:
                event["headers"] = [*event.get("headers", []), _CLOSE]
        elif event["type"] == "http.response.body" and is_cut_short:
            self._is_held = not event.get("more_body", False)
            event["more_body"] = True
        await self._send(event)

    async def finish(self) -> None:
        """Do what is left when the application has ended."""
        if self._is_late and not self._is_started:
            await self._answer_late()
        if not self._is_held:
            return
        # A connection that is closed with bytes unread is reset, and a client that is busy sending
        # would lose its answer. So they are taken, for as long as a body may take.
        now = asyncio.get_running_loop().time()
        self._deadline = max(self._deadline, now + LINGER_SECONDS)
        with contextlib.suppress(TimeoutError):
            while not self._is_complete:
                await self._receive_in_time()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _receive_in_time(self) -> ASGIReceiveEvent:
        """Receive from the server. Raises TimeoutError at the deadline of an incomplete body."""
        async with asyncio.timeout_at(None if self._is_complete else self._deadline):
            event = await self._receive()
        self._is_complete = event["type"] != "http.request" or not event.get("more_body", False)
        return event

    async def _answer_late(self) -> None:
        text = f"the body did not arrive within {self._seconds:g} s"
        body = msgspec.json.encode({"ok": False, "error": text})
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            _CLOSE,
        ]
        await self._send(
            {"type": "http.response.start", "status": 408, "headers": headers, "trailers": False}
        )
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        self._is_held = True


def _is_over(content_length: str, limit: int) -> bool:
    """Whether a Content-Length announces more than the limit; nonsense announces nothing."""
    return content_length.isdecimal() and int(content_length[:20]) > limit


def read_body(request: Request, limit: int) -> bytes:
    """Return the request's body; also when it was read before. Raises BodyTooLarge.

    A body that says itself that it is too large is not read. The first call decides for the whole
    request: a limit that is changed in between does not turn the start of a body into a whole one.
    """
    # Kept in an attribute of Django's request, because what reads the body (authentication, view)
    # may have a request of REST framework's own around that one. None: it is too large.
    shared: Any = request._request
    if not hasattr(shared, "_hook_body"):
        shared._hook_body = _read_whole(request, limit)
    body: bytes | None = shared._hook_body
    if body is None:
        raise BodyTooLarge(limit)
    return body


def _read_whole(request: Request, limit: int) -> bytes | None:
    if _is_over(request.META.get("CONTENT_LENGTH") or "", limit):
        return None
    body: bytes = request.read(limit + 1)
    return body if len(body) <= limit else None


def decode_json(body: bytes) -> Any:
    """Return the JSON value in a body. Raises PayloadError, whatever the bytes are."""
    try:
        return msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise PayloadError("the body is not valid UTF-8") from error
    except msgspec.DecodeError as error:
        raise PayloadError(f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise PayloadError("the body is nested too deep") from error
