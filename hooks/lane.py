"""The short way of a hook that is accepted: on the event loop, to the batching writer.

It asks what the view asks, in the same order: the query and the credential here, the decision on
the writer's thread; all of it is held in memory. What is accepted shares a commit with others.
Whatever else a request comes to, Django's handler and the view take it from the start, on a thread,
where one may wait for the database. So this way knows no answer of its own but the receipt, and
"too busy".

Those who share a commit are decided one right after the other: each on its own, between what the
event loop does for the next one, takes twice as long, because a processor keeps only so much code
at hand. It goes past REST framework as well: a request object, a response object and what is asked
of them take longer than all that is decided.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Any, Final, NamedTuple, cast

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
from django.db import DatabaseError
from django.http import HttpRequest, HttpResponse, QueryDict
from django.http.request import split_domain_port, validate_host
from django.http.response import HttpResponseBase
from django.utils.module_loading import import_string

from hooks import deliveries, throttling
from hooks.answers import Answer
from hooks.authentication import credential_of, is_use_noted, note_use
from hooks.configuration import hooks
from hooks.credentials import refuse_in_query
from hooks.deliveries import Arrival, Settled
from hooks.mapping import on_path
from hooks.models import ENDPOINTS
from wake.errors import WakeError
from wake.http_protocol import WHOLE_ANSWER, Otherwise, WriteAnswer, WriteWhole, header_lines
from wake.threads import on_kept_connection
from wake.writer import BatchingWriter

# It is kept which Hosts are known. A longer one is not, and takes no room there.
MAX_HOST_LENGTH: Final = 512

writer: Final[BatchingWriter[Arrival, Settled | None]] = BatchingWriter(deliveries.take_accepted)

# A body that is not there whole by then goes the other way, which knows how long to wait.
SOON_SECONDS: Final = 0.05

# What is done after an answer, and seldom: a token's use, the record of what was not accepted.
_afterwards = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hooks-afterwards")
# So many may wait for that. While the database is away each takes as long as its time limit.
MOST_AFTERWARDS: Final = 256
# A server that stops waits so long for it.
AFTERWARDS_SECONDS: Final = 5.0

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Let hooks that are accepted take the short way, while this lasts."""
    _standing_headers()  # making the middleware takes its time: not that of the first hook
    with writer.running():
        yield
    wait(_under_way, AFTERWARDS_SECONDS)
    for left in list(_under_way):
        left.cancel()


def _headers(scope: HTTPScope) -> dict[str, str]:
    """Return the headers as Django has them, by lower-case name.

    Values of one that comes twice are joined. One with an underscore is none: it could pass for
    another.
    """
    sent = list(scope["headers"])
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in sent}
    if len(headers) == len(sent) and "_" not in "".join(headers):
        return headers  # as most are
    headers = {}
    for raw_name, raw_value in sent:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        if "_" not in name:
            headers[name] = f"{headers[name]},{value}" if name in headers else value
    return headers


class _Asked(NamedTuple):
    """A hook's request that is there whole, and who is told how it is settled.

    None when it is to go the other way.
    """

    scope: HTTPScope
    path: str
    body: bytes
    told: Callable[[Settled | None], None]


class HookLane:
    """ASGI application around the site's that takes the short way where it can."""

    def __init__(self, application: ASGI3Application) -> None:
        self._application = application
        self._asked: list[_Asked] = []

    def take_whole(
        self, scope: Scope, body: bytes, answer: WriteAnswer, otherwise: Otherwise
    ) -> bool:
        """Take a hook's request without a task; see `wake.http_protocol.TakesWhole`."""

        def tell(settled: Settled | None) -> None:
            if settled is None:
                otherwise(self._application)
            else:
                encoded, own = _encoded(settled.answer)
                answer(settled.answer.status, _standing_lines() + header_lines(own), encoded)

        return self._ask(scope, body, tell)

    async def __call__(
        self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> None:
        if _hook_path(scope) is None:
            await self._application(scope, receive, send)
            return
        event, settled = await _read(receive), None
        if event and event["type"] == "http.request" and not event.get("more_body", False):
            told: asyncio.Future[Settled | None] = asyncio.get_running_loop().create_future()
            if self._ask(scope, event.get("body", b""), partial(_tell, told)):
                settled = await told
        if settled is None:
            await self._application(scope, _again(event, receive) if event else receive, send)
        else:
            await _send(settled.answer, scope, send)

    def _ask(self, scope: Scope, body: bytes, told: Callable[[Settled | None], None]) -> bool:
        """Take a request where it is a hook's, at the end of the event loop's turn.

        One right after the other, as they are decided: here, too, that takes half the time.
        """
        if scope["type"] != "http" or (path := _hook_path(scope)) is None:
            return False
        if not self._asked:
            # In nobody's context: they are requests of several connections.
            loop, context = asyncio.get_running_loop(), contextvars.Context()
            loop.call_soon(self._take, context=context)
        self._asked.append(_Asked(scope, path, body, told))
        return True

    def _take(self) -> None:
        asked, self._asked = self._asked, []
        for request in asked:
            try:
                _put(request)
            except Exception:  # the others wait, too
                logger.exception("hooks: a request could not be taken")


def _put(asked: _Asked) -> None:
    """Have a request stored, or tell at once that it goes the other way or cannot be."""
    arrival = _arrival(asked.scope, asked.path, asked.body)
    if arrival is None:
        asked.told(None)
        return
    try:
        writer.put(arrival, partial(_settle, arrival, asked.told))
    except WakeError as error:
        _settle(arrival, asked.told, error)


def _tell(told: asyncio.Future[Settled | None], settled: Settled | None) -> None:
    if not told.done():  # else whoever waited has left
        told.set_result(settled)


def _settle(
    arrival: Arrival,
    told: Callable[[Settled | None], None],
    stored: Settled | WakeError | None,
) -> None:
    """Tell how a request is settled: it is stored, or why it cannot be, or it is not accepted."""
    settled = (
        deliveries.refused_by_storage(arrival, stored) if isinstance(stored, WakeError) else stored
    )
    try:
        told(settled)
    finally:
        if settled and not (settled.is_recorded and _is_use_noted(arrival)):
            _do_afterwards(settled, arrival)


def _arrival(scope: HTTPScope, path: str, body: bytes) -> Arrival | None:
    """Return a request whose credential is right, or None where the other way is to take it."""
    try:
        return _arrival_of(scope, path, body)
    except Exception:  # whatever it is, the view finds it too, and answers it
        return None


def _arrival_of(scope: HTTPScope, path: str, body: bytes) -> Arrival | None:
    now, began, snapshot = datetime.now(UTC), time.monotonic(), hooks()
    headers = _headers(scope)
    if len(body) > snapshot.max_body_bytes or not _is_plain(headers):
        return None
    if path not in ENDPOINTS and any(
        mapping.transform for mapping in on_path(snapshot.mappings, path)
    ):
        return None  # anybody's code: it may take its time, and is to be called once
    query: dict[str, str] = {}
    if scope["query_string"]:
        # Decoded as Django does: what is not UTF-8 is refused.
        query = QueryDict(scope["query_string"].decode()).dict()
        refuse_in_query(query)
    credential = credential_of(snapshot, path, headers, lambda: body, now)
    if credential is None:
        return None
    return Arrival(
        path=path,
        body=body,
        headers=headers,
        query=query,
        credential=credential,
        client=throttling.client_of({"REMOTE_ADDR": (scope["client"] or ("",))[0]}),
        received_at=now,
        began=began,
    )


def _hook_path(scope: Scope) -> str | None:
    """Return the hook's path below the base path, or None where Django is to look first.

    That is what its middleware would answer: a NUL character.
    """
    if scope["type"] != "http" or not writer.is_running:
        return None
    if scope["method"] != "POST" or b"%00" in scope["query_string"] or "\0" in scope["path"]:
        return None
    return hooks().relative_path(scope["path"].removeprefix(scope.get("root_path", "")))


def _is_plain(headers: dict[str, str]) -> bool:
    """Whether Django's middleware has nothing to say to a hook with these headers.

    It answers an unknown Host, and anything with a cookie: hooks have none. Who asks first whether
    to send the body may be told not to.
    """
    host = headers.get("host", "")
    return (
        headers.keys().isdisjoint(_NOT_PLAIN)
        and len(host) <= MAX_HOST_LENGTH
        and _is_known(host, tuple(settings.ALLOWED_HOSTS))
    )


_NOT_PLAIN: Final = frozenset({"cookie", "upgrade", "expect"})


@lru_cache(maxsize=256)
def _is_known(host: str, allowed: Sequence[str]) -> bool:
    domain, _ = split_domain_port(host)
    return bool(domain) and validate_host(domain, list(allowed))


async def _read(receive: ASGIReceiveCallable) -> ASGIReceiveEvent | None:
    """Return the event that comes next, if it is there soon."""
    reading = receive().__await__()
    try:
        next(reading)
    except StopIteration as read:  # as usual, it is there already: a timer would cost more
        event: ASGIReceiveEvent = read.value
        return event
    reading.close()
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


# What is under way of that, and how many deliveries are not recorded, since that was last said.
_under_way: Final[set[Future[None]]] = set()
_left_out = 0


def _do_afterwards(settled: Settled, arrival: Arrival) -> None:
    """Record what was not recorded with the event, and note the use of the token."""
    global _left_out
    if len(_under_way) >= MOST_AFTERWARDS:
        _left_out += not settled.is_recorded
        return
    doing = _afterwards.submit(on_kept_connection, _do, settled, arrival)
    _under_way.add(doing)
    doing.add_done_callback(_under_way.discard)


def _do(settled: Settled, arrival: Arrival) -> None:
    global _left_out
    if not settled.is_recorded:
        deliveries.record(settled.draft)
    if not _is_use_noted(arrival):
        _note_use(arrival)
    if _left_out:
        logger.warning("hooks: %d deliveries are not recorded: too many waited", _left_out)
        _left_out = 0


def _is_use_noted(arrival: Arrival) -> bool:
    return is_use_noted(arrival.credential, arrival.received_at)


def _note_use(arrival: Arrival) -> None:
    # It is noted again with the next request: no reason to fail.
    with contextlib.suppress(DatabaseError):
        note_use(arrival.credential, arrival.received_at)


def _encoded(answer: Answer) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Return an answer's body and its own headers."""
    body = msgspec.json.encode(answer.body)
    own = [(b"content-length", b"%d" % len(body))]
    if answer.retry_after_seconds is not None:
        own.append((b"retry-after", b"%d" % answer.retry_after_seconds))
    return body, own


async def _send(answer: Answer, scope: Scope, send: ASGISendCallable) -> None:
    body, own = _encoded(answer)
    extensions = cast("Mapping[str, Any]", scope.get("extensions") or {})
    if whole := extensions.get(WHOLE_ANSWER):
        write: WriteWhole = whole["write"]
        if write(scope, answer.status, _standing_lines() + header_lines(own), body):
            return
    await send(
        {
            "type": "http.response.start",
            "status": answer.status,
            "headers": [*_standing_headers(), *own],
            "trailers": False,
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": False})


@lru_cache(maxsize=1)
def _standing_lines() -> bytes:
    return header_lines(_standing_headers())


@lru_cache(maxsize=1)
def _standing_headers() -> tuple[tuple[bytes, bytes], ...]:
    """Return the headers of every answer to a hook: what the site's middleware puts on it."""

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
        if name.lower() != "content-length"
    )
