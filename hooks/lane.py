"""The short way of a hook that is accepted: on the event loop, to the batching writer.

It asks what the view asks, in the same order: the query, the credential, the decision; all of it is
held in memory. What is accepted waits for a commit that it shares with others. Whatever else a
request comes to, Django's handler and the view take it from the start, on a thread, where one may
wait for the database. So this way knows no answer of its own but the receipt, and "too busy".

It goes past REST framework as well: a request object, a response object and what is asked of them
take longer than all that is decided here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, cast

import msgspec
from asgiref.typing import (
    ASGI3Application,
    ASGIReceiveCallable,
    ASGIReceiveEvent,
    ASGISendCallable,
    HTTPScope,
    Scope,
)
from django.conf import settings
from django.http import HttpRequest, HttpResponse, QueryDict
from django.http.request import split_domain_port, validate_host
from django.http.response import HttpResponseBase
from django.utils.module_loading import import_string

from hooks import answers, deliveries, throttling
from hooks.answers import Answer
from hooks.authentication import credential_of, is_use_noted, note_use
from hooks.configuration import hooks
from hooks.credentials import refuse_in_query
from hooks.deliveries import Accepted, Arrival, Settled
from wake.errors import WakeError
from wake.threads import call_in
from wake.writer import BatchingWriter

# It is kept which Hosts are known. A longer one is not, and takes no room there.
MAX_HOST_BYTES: Final = 512

writer: Final[BatchingWriter[Accepted, Settled]] = BatchingWriter(deliveries.store)

# A body that is not there whole by then goes the other way, which knows how long to wait.
SOON_SECONDS: Final = 0.05

# What is done after an answer, and seldom: a token's use, the record of what was not accepted.
_afterwards = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hooks-afterwards")


def _headers(scope: HTTPScope) -> dict[str, str]:
    """Return the headers by lower-case name; values of one that comes twice are joined."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    return headers


class HookLane:
    """ASGI application around the site's that takes the short way where it can."""

    def __init__(self, application: ASGI3Application) -> None:
        self._application = application

    async def __call__(
        self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> None:
        path = _hook_path(scope) if scope["type"] == "http" and writer.is_running else None
        if path is None or scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        event = await _read(receive)
        accepted = None
        if event and event["type"] == "http.request" and not event.get("more_body", False):
            accepted = _begin(scope, path, event.get("body", b""))
        if accepted:
            await _send(await _stored(accepted), send)
        else:
            await self._application(scope, _again(event, receive) if event else receive, send)


def _begin(scope: HTTPScope, path: str, body: bytes) -> Accepted | None:
    """Return what a request asks for, or None where it is not simply accepted."""
    now, began = datetime.now(UTC), time.monotonic()
    if len(body) > hooks().max_body_bytes:
        return None
    headers = _headers(scope)
    try:
        query = QueryDict(scope["query_string"]).dict() if scope["query_string"] else {}
        refuse_in_query(query)
        credential = credential_of(path, headers, lambda: body, now)
        if credential is None:
            return None
        begun = deliveries.begin(
            Arrival(
                path=path,
                body=body,
                headers=headers,
                query=query,
                credential=credential,
                client=throttling.client_of({"REMOTE_ADDR": (scope["client"] or ("",))[0]}),
                received_at=now,
                began=began,
            )
        )
    except Exception:  # whatever it is, the view finds it too, and answers it
        return None
    return begun if isinstance(begun, Accepted) else None


def _hook_path(scope: HTTPScope) -> str | None:
    """Return the hook's path below the base path, or None where Django is to look first.

    That is what its middleware would answer: an unknown Host, a NUL character, anything with a
    cookie. Hooks have none.
    """
    if scope["method"] != "POST" or b"%00" in scope["query_string"] or "\0" in scope["path"]:
        return None
    path = hooks().relative_path(scope["path"].removeprefix(scope.get("root_path", "")))
    if path is None:
        return None
    host = b""
    for name, value in scope["headers"]:
        if name == b"host":
            host = value
        elif name in {b"cookie", b"upgrade"}:
            return None
    if len(host) > MAX_HOST_BYTES:
        return None
    return path if _is_known(host.decode("latin-1"), tuple(settings.ALLOWED_HOSTS)) else None


@lru_cache(maxsize=256)
def _is_known(host: str, allowed: Sequence[str]) -> bool:
    domain, _ = split_domain_port(host)
    return bool(domain) and validate_host(domain, list(allowed))


async def _read(receive: ASGIReceiveCallable) -> ASGIReceiveEvent | None:
    """Return the event that comes next, if it is there soon: usually it is there already."""
    try:
        async with asyncio.timeout(SOON_SECONDS):
            return await receive()
    except TimeoutError:
        return None


def _again(event: ASGIReceiveEvent, receive: ASGIReceiveCallable) -> ASGIReceiveCallable:
    """Return a `receive` that gives what was received once more, and then what comes."""
    given = [event]

    async def receive_again() -> ASGIReceiveEvent:
        return given.pop() if given else await receive()

    return receive_again


async def _stored(accepted: Accepted) -> Answer:
    """Return the answer to a request once it is stored, or why it cannot be."""
    try:
        settled = await writer.put(accepted)
    except WakeError as error:
        return answers.of_error(error)
    if not settled.is_recorded:
        _later(deliveries.record, settled.draft)
    arrival = accepted.arrival
    if not is_use_noted(arrival.credential, arrival.received_at):
        _later(note_use, arrival.credential, arrival.received_at)
    return settled.answer


_under_way: set[asyncio.Task[None]] = set()


def _later(do: Callable[..., None], *arguments: Any) -> None:
    async def call() -> None:
        with contextlib.suppress(RuntimeError):  # the process ends
            await call_in(_afterwards, do, *arguments)

    task = asyncio.create_task(call())
    _under_way.add(task)
    task.add_done_callback(_under_way.discard)


async def _send(answer: Answer, send: ASGISendCallable) -> None:
    body = msgspec.json.encode(answer.body)
    headers = [
        *_standing_headers(),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if answer.retry_after_seconds is not None:
        headers.append((b"retry-after", str(answer.retry_after_seconds).encode()))
    await send(
        {
            "type": "http.response.start",
            "status": answer.status,
            "headers": headers,
            "trailers": False,
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": False})


@lru_cache(maxsize=1)
def _standing_headers() -> tuple[tuple[bytes, bytes], ...]:
    """Return what the site's middleware puts on every answer to a hook."""

    def answer(request: HttpRequest) -> HttpResponseBase:
        response = HttpResponse(content_type="application/json")
        response["Allow"] = "POST"
        return response

    handler: Callable[[HttpRequest], HttpResponseBase] = answer
    for name in reversed(settings.MIDDLEWARE):
        handler = import_string(name)(handler)
    request = HttpRequest()
    request.method, request.path, request.path_info = "POST", "/", "/"
    request.META = {"SERVER_NAME": "localhost", "SERVER_PORT": "80"}
    response = cast("HttpResponse", handler(request))
    return tuple(
        (name.lower().encode("latin-1"), value.encode("latin-1"))
        for name, value in response.items()
        if name.lower() not in {"content-type", "content-length"}
    )
