"""The body of a hook: how much of it is read, and what it must be."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec
from asgiref.typing import (
    ASGI3Application,
    ASGIReceiveCallable,
    ASGIReceiveEvent,
    ASGISendCallable,
    HTTPRequestEvent,
    HTTPScope,
    Scope,
)
from django.conf import settings
from rest_framework.request import Request

from hooks.configuration import hooks
from hooks.errors import BodyTooLarge, PayloadError

MAX_OTHER_BODY_BYTES: Final = settings.DATA_UPLOAD_MAX_MEMORY_SIZE

_NOTHING: Final[HTTPRequestEvent] = {"type": "http.request", "body": b"", "more_body": False}


class BodyLimit:
    """ASGI application around Django's: never takes more of a body than may be.

    For a hook that is what the policy allows, for all else what Django takes into memory.
    Django stores a body whole before any view sees the request. Here the rest of one that is too
    large is left unread, and what was read is handed over as if it ended there, one byte over the
    limit; the view, which knows whether the credential is right, then refuses it (`read_body`).
    """

    def __init__(self, application: ASGI3Application) -> None:
        self._application = application

    async def __call__(
        self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> None:
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            is_hook = hooks().relative_path(path) is not None
            limit = hooks().max_body_bytes if is_hook else MAX_OTHER_BODY_BYTES
            receive = _limited(receive, scope, limit)
        await self._application(scope, receive, send)


def _limited(receive: ASGIReceiveCallable, scope: HTTPScope, limit: int) -> ASGIReceiveCallable:
    """Return `receive` cut off one byte after `limit`, or at once when the request announces more.

    After the cut nothing is received: a caller that waits for the client to leave waits until it
    is cancelled.
    """
    left = limit + 1
    headers = dict(scope["headers"])
    if _is_over(headers.get(b"content-length", b"").decode("latin-1"), limit):
        left = 0
    cut = False

    async def limited() -> ASGIReceiveEvent:
        nonlocal left, cut
        if cut:
            await asyncio.get_running_loop().create_future()
        if left == 0:
            cut = True
            return _NOTHING
        event = await receive()
        if event["type"] != "http.request":
            return event
        body = event.get("body", b"")[:left]
        left -= len(body)
        cut = left == 0
        more = event.get("more_body", False) and not cut
        return {"type": "http.request", "body": body, "more_body": more}

    return limited


def _is_over(content_length: str, limit: int) -> bool:
    """Whether a Content-Length announces more than the limit; nonsense announces nothing."""
    return content_length.isdecimal() and int(content_length[:20]) > limit


def read_body(request: Request, limit: int) -> bytes:
    """Return the request's body. Raises BodyTooLarge; one that says so itself is not read."""
    if not _is_over(request.META.get("CONTENT_LENGTH") or "", limit):
        body: bytes = request.read(limit + 1)
        if len(body) <= limit:
            return body
    raise BodyTooLarge(f"the body is larger than {limit} bytes, the limit in the hook policy")


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
