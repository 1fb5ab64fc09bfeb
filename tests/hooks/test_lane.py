"""The short way of accepted hooks: the same answers and the same rows as by the view."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from asgiref.typing import ASGIReceiveCallable, ASGISendCallable, Scope
from django.core.asgi import get_asgi_application
from django.db import connection
from django.db.models import Count, Sum

from hooks import authentication, deliveries, lane, tokens
from hooks.bodies import BodyLimit
from hooks.deliveries import Accepted, Arrival, Settled
from hooks.lane import HookLane
from hooks.models import FailedCredentials, HookDelivery, HookMapping, HookToken, IdempotencyKey
from hooks.transforms import register
from tests.hooks.conftest import allow_keys, rows
from tests.hooks.raw_http import chunk
from tests.live import LiveGateway
from tests.wake.gateway_server import serving
from wake import metrics
from wake.http_protocol import BoundedHeadProtocol
from wake.models import GatewaySettings, Session, SystemEvent, Tally

pytestmark = pytest.mark.django_db(transaction=True)

SECRET = "a-secret-of-a-sender"
IDS = ("eventId", "runId")
RECORDED = (
    "client",
    "credential",
    "credential_mappings",
    "path",
    "mapping_name",
    "status",
    "outcome",
    "error",
    "idempotency_key",
    "has_body",
    "headers",
    "query",
)
_called: list[str] = []


@register("lane-test")
def transform(payload: Any, headers: Any, query: Any, path: Any) -> dict[str, Any]:
    """Say that it was called."""
    _called.append(path)
    return {"text": "transformed"}


# --- One site, two ways -------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """The site on real sockets; `by_django` are the paths that the view was asked for.

    `port` is the gateway's own server, `other_port` one that knows nothing but ASGI.
    """

    port: int
    other_port: int
    token: str
    limited: str
    by_django: list[str]

    def ask(self, request: Request, *, by_other: bool = False) -> tuple[int, dict[str, str], Any]:
        """Send a request and return status, headers and the body, without what differs always."""
        port = self.other_port if by_other else self.port
        with socket.create_connection(("127.0.0.1", port), 10) as connected:
            parts = list(request.parts(self))
            for part in parts if request.slow else [b"".join(parts)]:
                connected.sendall(part)
                time.sleep(0.02)
            response = http.client.HTTPResponse(connected, method=request.method)
            response.begin()
            body = response.read()
        headers = {name.lower(): value for name, value in response.getheaders()}
        assert headers.pop("date")
        return response.status, headers, _without_ids(body)


@dataclass(frozen=True)
class Request:
    """A request as it is sent. In `lines`, TOKEN and LIMITED stand for tokens."""

    body: Any = None
    path: str = "/hooks/wake"
    lines: Sequence[str] = ("Authorization: Bearer TOKEN",)
    host: Sequence[str] = ("Host: localhost",)
    method: str = "POST"
    chunks: int = 0  # how many the body comes in; else its length is announced
    slow: bool = False  # in parts
    signed: bool = False
    takes_lane: bool = True

    def parts(self, site: Site) -> Iterator[bytes]:
        body = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        lines = [
            line.replace("TOKEN", site.token).replace("LIMITED", site.limited)
            for line in (*self.host, *self.lines)
        ]
        if self.signed:
            digest = hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
            lines.append(f"X-Hub-Signature-256: sha256={digest}")
        lines.append(
            "Transfer-Encoding: chunked" if self.chunks else f"Content-Length: {len(body)}"
        )
        head = "\r\n".join([f"{self.method} {self.path} HTTP/1.1", *lines, "", ""])
        yield head.encode("latin-1")
        if not self.chunks:
            yield body[: len(body) // 2]
            yield body[len(body) // 2 :]
            return
        size = max(1, len(body) // self.chunks)
        for start in range(0, len(body), size):
            yield chunk(body[start : start + size])
        yield chunk(b"")


def _without_ids(body: bytes) -> Any:
    try:
        answer = json.loads(body)
    except ValueError:
        return body
    for result in [answer, *answer.get("results", [])]:
        for name in IDS:
            if name in result:
                assert result[name]
                result[name] = "an id"
    return answer


def _without_uuid(key: str) -> str:
    return re.sub(r"[0-9a-f-]{36}", "an id", key)


@pytest.fixture
def site() -> Iterator[Site]:
    """The site with mappings, tokens, and keys of requests allowed below `hook:`."""
    metrics._noted.clear()
    allow_keys("hook:")
    ci = HookMapping.objects.create(name="ci", match_path="ci", text_template="ci {{payload}}")
    HookMapping.objects.create(
        name="seen",
        match_path="a/b",
        text_template="{{path}} {{query.q}} {{headers.x-event}} {{headers.x_event}}",
        session_key="hook:seen",
    )
    HookMapping.objects.create(
        name="each", match_path="each", for_each="items", text_template="{{items[0].n}}"
    )
    HookMapping.objects.create(
        name="turn", match_path="turn", action="agent", text_template="turn {{n}}"
    )
    HookMapping.objects.create(name="own", match_path="own", transform="lane-test")
    signed = HookMapping(
        name="signed", match_path="signed", text_template="{{n}}", signature_scheme="github"
    )
    signed.signing_secret = SECRET
    signed.save()
    limited, shown = tokens.create("limited")
    limited.limited = True
    limited.save()
    limited.mappings.set([ci])
    by_django: list[str] = []
    django: Any = get_asgi_application()

    async def counted(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        by_django.append(cast("Any", scope)["path"])
        await django(scope, receive, send)

    application = HookLane(BodyLimit(counted))
    with serving(application, http=BoundedHeadProtocol) as own, serving(application) as other:
        yield Site(_port(own), _port(other), tokens.create("tests")[1], shown, by_django)


def _port(url: str) -> int:
    return int(url.rstrip("/").rsplit(":", 1)[1])


def stored(records: int) -> Any:
    """Return all that is stored, without what differs always, once so many records are there."""
    deadline = time.monotonic() + 5
    while HookDelivery.objects.count() < records and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    metrics.write_noted()
    used = HookToken.objects.filter(last_used_at__isnull=False)
    while (
        not used
        and HookDelivery.objects.filter(credential="token tests")
        and (time.monotonic() < deadline)
    ):
        time.sleep(0.01)
        used = used.all()
    return {
        "events": [
            (_without_uuid(key), *rest)
            for key, *rest in SystemEvent.objects.order_by("pk").values_list(
                "session__key", "text", "source", "external", "state", "alone"
            )
        ],
        "sessions": [
            (_without_uuid(key), *rest)
            for key, *rest in Session.objects.order_by("agent", "key").values_list(
                "key", "queued", "due_reason"
            )
        ],
        "deliveries": [
            {
                **{name: getattr(delivery, name) for name in RECORDED},
                "body": bytes(delivery.body or b""),
                "answer": _without_ids(json.dumps(delivery.answer or {}).encode()),
            }
            for delivery in HookDelivery.objects.order_by("pk")
        ],
        "tallies": sorted(Tally.objects.values_list("name", "labels").annotate(total=Sum("value"))),
        "used": sorted(used.values_list("name", flat=True)),
        "failed": FailedCredentials.objects.count(),
    }


def forget() -> None:
    """Take back all that requests have left."""
    HookDelivery.objects.update(replay_of=None)
    for model in (SystemEvent, Session, HookDelivery, IdempotencyKey, FailedCredentials, Tally):
        model._default_manager.all().delete()
    HookToken.objects.update(last_used_at=None)
    authentication._noted.clear()


KEYED = ("Authorization: Bearer TOKEN", "Idempotency-Key: k")
REQUESTS = {
    "wake": Request({"text": "x"}),
    "next heartbeat": Request({"text": "x", "mode": "next-heartbeat"}),
    "a session": Request({"text": "caf\xe9 \u2028", "sessionKey": "hook:\xe9"}),
    "token header": Request({"text": "x"}, lines=["X-OpenClaw-Token: TOKEN"]),
    "two tokens": Request(
        {"text": "x"}, lines=["Authorization: Bearer no", "x-openclaw-token: TOKEN"]
    ),
    "a header twice": Request(
        {"text": "x"}, lines=["Authorization: Bearer TOKEN", "X-A: 1", "x-a: 2"]
    ),
    "the token twice": Request(
        {"text": "x"}, lines=["Authorization: Bearer TOKEN"] * 2, takes_lane=False
    ),
    "agent": Request({"message": "x", "name": "n", "timeoutSeconds": 5}, "/hooks/agent"),
    "chunks": Request({"text": "x" * 100}, chunks=5),
    "slow chunks": Request({"text": "x" * 100}, chunks=5, slow=True, takes_lane=False),
    "parts": Request({"text": "x" * 100}, slow=True, takes_lane=False),
    "expect": Request(
        {"text": "x"}, lines=[*KEYED, "Expect: 100-continue"], slow=True, takes_lane=False
    ),
    "outer slashes": Request({"text": "x"}, "/hooks//wake/"),
    "escaped": Request({"text": "x"}, "/hooks/w%61ke"),
    "a dot": Request({"text": "x"}, "/hooks/%2e/wake", takes_lane=False),
    "up": Request({"text": "x"}, "/hooks/../hooks/wake", takes_lane=False),
    "two slashes": Request({"text": "x"}, "//hooks/wake", takes_lane=False),
    "a mapping": Request(
        [1], "/hooks/a/b?q=%C3%A9&q=2&secret=s", ["X-OpenClaw-Token: TOKEN", "X-Event: e"]
    ),
    "underscores": Request([1], "/hooks/a/b", ["X-OpenClaw-Token: TOKEN", "X_Event: e"]),
    "a broken escape": Request([1], "/hooks/a/b?q=%E9"),
    "each": Request({"items": [{"n": 1}, {"n": 2}]}, "/hooks/each"),
    "each, none": Request({"items": []}, "/hooks/each", takes_lane=False),
    "a turn": Request({"n": 1}, "/hooks/turn"),
    "a transform": Request({}, "/hooks/own", takes_lane=False),
    "signed": Request({"n": 1}, "/hooks/signed", lines=[], signed=True),
    "not signed": Request({"n": 1}, "/hooks/signed", lines=[], takes_lane=False),
    "a limited token": Request({"n": 1}, "/hooks/ci", ["Authorization: Bearer LIMITED"]),
    "a limited token elsewhere": Request(
        {"text": "x"}, lines=["Authorization: Bearer LIMITED"], takes_lane=False
    ),
    "a limited token and one": Request(
        {"text": "x"}, lines=["Authorization: Bearer LIMITED", "X-OpenClaw-Token: TOKEN"]
    ),
    "a key": Request({"text": "x"}, lines=KEYED),
    "an odd header": Request(
        {"text": "x"}, lines=[*KEYED, "X-Odd: caf\xe9", "X-Forwarded-For: 1.2.3.4"]
    ),
    "text with NUL": Request(b'{"text": "a\\u0000b"}', takes_lane=False),
    "half a character": Request(b'{"text": "\\ud800"}', takes_lane=False),
    "not UTF-8": Request(b'{"text": "\xff"}', takes_lane=False),
    "no JSON": Request(b"{", takes_lane=False),
    "no body": Request(b"", takes_lane=False),
    "no text": Request({"text": " "}, takes_lane=False),
    "too large": Request({"text": "x" * 300_000}, takes_lane=False),
    "no credential": Request({"text": "x"}, lines=[], takes_lane=False),
    "a token in the query": Request({"text": "x"}, "/hooks/wake?Token=x", takes_lane=False),
    "NUL in the query": Request({"text": "x"}, "/hooks/wake?a=%00", takes_lane=False),
    "NUL in the path": Request({"text": "x"}, "/hooks/wake%00", takes_lane=False),
    "a forbidden key": Request({"text": "x", "sessionKey": "other"}, takes_lane=False),
    "no hook": Request({}, "/hooks/none", takes_lane=False),
    "GET": Request({"text": "x"}, method="GET", takes_lane=False),
    "HEAD": Request({"text": "x"}, method="HEAD", takes_lane=False),
    "PUT": Request({"text": "x"}, method="PUT", takes_lane=False),
    "a host with a port": Request({"text": "x"}, host=["Host: LOCALHOST:8000"]),
    "an unknown host": Request({"text": "x"}, host=["Host: example.com"], takes_lane=False),
    "no host": Request({"text": "x"}, host=[], takes_lane=False),
    "two hosts": Request(
        {"text": "x"}, host=["Host: example.com", "Host: localhost"], takes_lane=False
    ),
    "a cookie": Request({"text": "x"}, lines=[*KEYED, "Cookie: sessionid=x"], takes_lane=False),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_both_ways_answer_and_store_the_same(site: Site, name: str) -> None:
    request = REQUESTS[name]
    by_view = site.ask(request)
    records = HookDelivery.objects.count() if by_view[0] != 200 else 1
    expected = stored(records)
    for by_other in (False, True):
        forget()
        _called.clear()
        site.by_django.clear()
        with lane.running():
            by_lane = site.ask(request, by_other=by_other)
            assert by_lane == by_view
            assert stored(len(expected["deliveries"])) == expected
        assert (site.by_django == []) is request.takes_lane
        assert len(_called) <= 1
    if by_view[0] == 200:
        assert {"content-security-policy", "x-content-type-options", "allow"} <= by_view[1].keys()


# --- What is answered otherwise -----------------------------------------------------------------


@contextlib.contextmanager
def broken(table: str) -> Iterator[None]:
    """Have a table away, so that the database refuses what needs it."""
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER TABLE {table} RENAME TO away")
        try:
            yield
        finally:
            cursor.execute(f"ALTER TABLE away RENAME TO {table}")


@pytest.mark.parametrize("table", ["wake_systemevent", "hooks_hookdelivery"])
def test_what_cannot_be_stored_is_answered_503_by_both_ways(site: Site, table: str) -> None:
    answers = []
    for way in (contextlib.nullcontext, lane.running):
        with way(), broken(table):
            answers.append(site.ask(Request({"text": "x"})))
            assert metrics._noted.pop(("hook", "failed")) == 1
    assert answers[0] == answers[1]
    status, headers, body = answers[1]
    assert (status, headers["retry-after"], body["ok"]) == (503, "5", False)
    with lane.running():
        assert site.ask(Request({"text": "x"}))[0] == 200
    assert SystemEvent.objects.count() == 1


@contextlib.contextmanager
def holding(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, list[int]]]:
    """Hold the writer's batches until the event is set, and list how large each is."""
    is_open = threading.Event()
    sizes: list[int] = []

    def write(batch: Sequence[Arrival]) -> list[Settled | None]:
        sizes.append(len(batch))
        assert is_open.wait(10)
        return deliveries.take_accepted(batch)

    monkeypatch.setattr(lane.writer, "_write", write)
    with lane.running():
        try:
            yield is_open, sizes
        finally:
            is_open.set()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ask_at_once(
    site: Site, requests: Sequence[Request], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, dict[str, str], Any]]:
    """Send requests so that they are stored as one batch, in their order; return the answers."""
    with holding(monkeypatch) as (is_open, sizes), ThreadPoolExecutor(len(requests) + 1) as pool:
        first = pool.submit(site.ask, Request({"text": "first"}))
        until(lambda: sizes)
        answers = []
        for number, request in enumerate(requests, 2):
            answers.append(pool.submit(site.ask, request))
            until(lambda number=number: lane.writer.waiting == number)  # type: ignore[misc]
        is_open.set()
        assert first.result()[0] == 200
        result = [answer.result() for answer in answers]
    assert sizes == [1, len(requests)]
    return result


def counted_wakes() -> dict[str, float]:
    """Return how many wakes were counted, by labels."""
    metrics.write_noted()
    return dict(Tally.objects.filter(name="wakes").values_list("labels").annotate(Sum("value")))


def test_a_batch_keeps_its_order_whatever_is_in_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ask_at_once(
        site,
        [
            Request({"text": "a"}),
            Request({"text": "b"}, lines=KEYED),
            Request({"text": "c"}),
            Request({"text": "b again"}, lines=KEYED),
            Request({"items": [{"n": "d"}, {"n": "e"}]}, "/hooks/each"),
            Request({"text": "f"}),
            Request({"text": "g"}),
        ],
        monkeypatch,
    )
    assert [status for status, _, _ in answers] == [200] * 7
    assert [body.get("eventOutcome") for _, _, body in answers[:4]] == [
        *["queued"] * 3,
        "replayed",
    ]
    texts = list(SystemEvent.objects.order_by("pk").values_list("text", flat=True))
    assert texts == ["first", *"abcdefg"]
    assert HookDelivery.objects.count() == 8


def test_what_is_refused_in_a_batch_keeps_nobody_else_and_is_recorded_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ask_at_once(
        site,
        [
            Request({"text": "a"}),
            Request({"text": ""}),
            Request({}, "/hooks/nowhere"),
            Request({"text": "b"}),
            Request({"text": "c", "agentId": "nobody"}),
        ],
        monkeypatch,
    )
    assert [status for status, _, _ in answers] == [200, 400, 404, 200, 400]
    texts = SystemEvent.objects.order_by("pk").values_list("text", flat=True)
    assert list(texts) == ["first", "a", "b"]

    def counted() -> dict[int, int]:
        statuses = HookDelivery.objects.values_list("status").annotate(Count("pk"))
        return dict(statuses.order_by())

    until(lambda: counted() == {200: 3, 400: 2, 404: 1})
    assert counted_wakes() == {"door=hook,outcome=queued": 3, "door=hook,outcome=refused": 3}


def test_who_has_no_right_credential_does_not_wait_for_the_database(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holding(monkeypatch) as (is_open, sizes), ThreadPoolExecutor(1) as pool:
        first = pool.submit(site.ask, Request({"text": "first"}))
        until(lambda: sizes)
        stranger = Request({"text": "x"}, lines=["X-OpenClaw-Token: another"])
        assert site.ask(stranger)[0] == 401
        assert lane.writer.waiting == 1
        is_open.set()
        assert first.result()[0] == 200


def test_of_a_batch_only_those_fail_whose_session_is_full(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    GatewaySettings.objects.update(max_queued_events=2)
    wakes = [
        Request({"text": f"{number}", "sessionKey": f"hook:{key}"})
        for number, key in enumerate("aaabac")
    ]
    answers = ask_at_once(site, wakes, monkeypatch)
    assert [status for status, _, _ in answers] == [200, 200, 429, 200, 429, 200]
    assert HookDelivery.objects.filter(status=429).count() == 2
    assert counted_wakes() == {"door=hook,outcome=queued": 5, "door=hook,outcome=full": 2}


def test_a_mapping_that_is_deleted_meanwhile_fails_nobody_else(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = deliveries.store

    def delete_and_store(batch: Sequence[Accepted]) -> list[Settled]:
        if len(batch) > 1:  # those are decided already
            HookMapping.objects.filter(name="ci").delete()
        return store(batch)

    monkeypatch.setattr(deliveries, "store", delete_and_store)
    wakes = [Request({"text": "a"}), Request({}, "/hooks/ci"), Request({"text": "b"})]
    answers = ask_at_once(site, wakes, monkeypatch)
    assert [status for status, _, _ in answers] == [200, 503, 200]
    texts = SystemEvent.objects.order_by("pk").values_list("text", flat=True)
    assert list(texts) == ["first", "a", "b"]


def test_when_the_database_is_away_one_of_a_batch_waits_for_it_and_no_other(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Accepted] = []
    alone = deliveries._store_alone

    def store_alone(accepted: Accepted) -> Settled:
        tried.append(accepted)
        return alone(accepted)

    keyed = [
        Request({"text": "x"}, lines=["X-OpenClaw-Token: TOKEN", f"Idempotency-Key: {number}"])
        for number in range(3)
    ]
    with holding(monkeypatch) as (is_open, sizes), ThreadPoolExecutor(4) as pool:
        first = pool.submit(site.ask, Request({"text": "first"}))
        until(lambda: sizes)
        answers = [pool.submit(site.ask, request) for request in keyed]
        until(lambda: lane.writer.waiting == 4)
        monkeypatch.setattr(deliveries, "_store_alone", store_alone)
        with broken("hooks_idempotencykey"):
            is_open.set()
            assert [answer.result()[0] for answer in answers] == [503] * 3
        assert first.result()[0] == 200
    assert len(tried) == 2
    assert metrics._noted.pop(("hook", "failed")) == 3


def test_records_that_wait_are_bounded_and_what_is_left_out_is_said(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    GatewaySettings.objects.update(max_queued_events=0)
    monkeypatch.setattr(lane, "MOST_AFTERWARDS", 2)
    is_open = threading.Event()
    lane._afterwards.submit(is_open.wait, 10)
    with lane.running():
        for _ in range(4):
            assert site.ask(Request({"text": "x"}))[0] == 429
        is_open.set()
        until(lambda: "2 deliveries are not recorded" in caplog.text)
        until(lambda: HookDelivery.objects.count() == 2)


def test_at_the_end_what_was_refused_is_recorded_and_what_takes_too_long_is_left(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    GatewaySettings.objects.update(max_queued_events=0)
    refused = Request({"text": "x"})
    with lane.running():
        lane._afterwards.submit(time.sleep, 0.3)
        assert site.ask(refused)[0] == 429
    assert HookDelivery.objects.count() == 1
    monkeypatch.setattr(lane, "AFTERWARDS_SECONDS", 0.1)
    is_open = threading.Event()
    with lane.running():
        lane._afterwards.submit(is_open.wait, 10)
        assert site.ask(refused)[0] == 429
    is_open.set()
    lane._afterwards.submit(lambda: None).result(10)
    assert HookDelivery.objects.count() == 1
    assert not lane._under_way


def test_who_leaves_has_the_event_stored_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request({"text": "x"})
    with holding(monkeypatch) as (is_open, sizes):
        with socket.create_connection(("127.0.0.1", site.port), 10) as connected:
            connected.sendall(b"".join(request.parts(site)))
            until(lambda: sizes)
        is_open.set()
        until(HookDelivery.objects.exists)
        assert site.ask(Request({"text": "y"}))[0] == 200
    texts = SystemEvent.objects.order_by("pk").values_list("text", flat=True)
    assert list(texts) == ["x", "y"]
    assert HookDelivery.objects.count() == 2


@pytest.mark.parametrize("after", [b"", b"garbage\r\n\r\n"], ids=["leaves", "garbage"])
@pytest.mark.parametrize("path", ["/hooks/wake", "/hooks/none"])
def test_who_leaves_with_several_requests_under_way_is_no_error(
    site: Site, path: str, after: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    one = b"".join(Request({"text": "x"}, path).parts(site))
    with lane.running():
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", site.port), 10) as connected:
                connected.sendall(one * 4 + after)
                time.sleep(0.02 if after else 0)
        assert site.ask(Request({"text": "y"}))[0] == 200
        time.sleep(0.3)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_who_leaves_before_the_body_is_whole_leaves_nothing(site: Site) -> None:
    parts = list(Request({"text": "x"}).parts(site))
    with lane.running():
        with socket.create_connection(("127.0.0.1", site.port), 10) as connected:
            connected.sendall(b"".join(parts[:-1]))
        assert site.ask(Request({"text": "y"}))[0] == 200
    assert rows()[1] == 1


def test_200_requests_over_20_connections(site: Site) -> None:
    def send(number: int) -> list[str]:
        """Send ten wakes over one connection and return their ids."""
        connected = http.client.HTTPConnection("127.0.0.1", site.port, timeout=30)
        headers = {"Authorization": f"Bearer {site.token}", "Host": "localhost"}
        ids = []
        for place in range(10):
            wake = {"text": f"{place}", "sessionKey": f"hook:{number}"}
            connected.request("POST", "/hooks/wake", json.dumps(wake), headers)
            response = connected.getresponse()
            answer = json.loads(response.read())
            assert response.status == 200, answer
            ids.append(answer["eventId"])
        connected.close()
        return ids

    with lane.running(), ThreadPoolExecutor(20) as pool:
        sent = list(pool.map(send, range(20)))
    for number, ids in enumerate(sent):
        events = SystemEvent.objects.filter(session__key=f"agent:main:hook:{number}").order_by("pk")
        assert [(str(uid), text) for uid, text in events.values_list("uid", "text")] == [
            (uid, f"{place}") for place, uid in enumerate(ids)
        ]
    assert SystemEvent.objects.count() == HookDelivery.objects.count() == 200
    assert len(site.by_django) < 20  # whose body came late: this client sends it after the head
    assert dict(
        Tally.objects.filter(name="wakes").values_list("labels").annotate(Sum("value"))
    ) == {"door=hook,outcome=queued": 200}


# --- A whole gateway ----------------------------------------------------------------------------

LIST_EVENTS = (
    "from wake.models import SystemEvent; "
    "print(*SystemEvent.objects.order_by('pk').values_list('uid', flat=True), sep='\\n')"
)


def flood(gateway: LiveGateway, seconds: float, end: Callable[[], object]) -> list[list[str]]:
    """Send wakes over eight connections, end the gateway meanwhile, and return what it answered.

    By connection, the ids of the events in the order of the answers.
    """
    acknowledged: list[list[str]] = [[] for _ in range(8)]
    port = gateway.port

    def send(ids: list[str], number: int) -> None:
        connected = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        headers = {"Authorization": f"Bearer {gateway.hook_token}"}
        with contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                wake = json.dumps({"text": f"{number} {len(ids)}"})
                connected.request("POST", "/hooks/wake", wake, headers)
                response = connected.getresponse()
                answer = json.loads(response.read())
                if response.status == 200:
                    ids.append(answer["eventId"])

    with ThreadPoolExecutor(8) as pool:
        for number, ids in enumerate(acknowledged):
            pool.submit(send, ids, number)
        time.sleep(seconds)
        end()
    return acknowledged


def assert_nothing_lost(gateway: LiveGateway, acknowledged: list[list[str]]) -> None:
    """Check that each acknowledged event is there once, those of a connection in their order."""
    order = gateway.manage("shell", "-v0", "-c", LIST_EVENTS).stdout.split()
    places = {uid: place for place, uid in enumerate(order)}
    assert len(places) == len(order)
    assert sum(map(len, acknowledged)) > 50
    for ids in acknowledged:
        assert [places[uid] for uid in ids] == sorted(places[uid] for uid in ids)


def test_a_stop_in_the_middle_loses_nothing_acknowledged(live_gateway: LiveGateway) -> None:
    status: list[int | None] = []
    acknowledged = flood(live_gateway, 1, lambda: status.append(live_gateway.stop()))
    assert status == [0]
    assert_nothing_lost(live_gateway, acknowledged)


def test_two_workers_take_hooks_and_lose_nothing(tmp_path: Path) -> None:
    if connection.vendor != "postgresql":
        pytest.skip("more than one worker needs PostgreSQL: set DATABASE_URL")
    redis = "redis://127.0.0.1:6379/9"
    with contextlib.closing(socket.socket()) as probe:
        if probe.connect_ex(("127.0.0.1", 6379)):
            pytest.skip("more than one worker needs Redis, on its usual port")
    with LiveGateway(
        tmp_path, arguments=("--workers", "2"), environment={"REDIS_URL": redis}
    ) as gateway:
        acknowledged = flood(gateway, 3, gateway.stop)
        assert_nothing_lost(gateway, acknowledged)
        assert gateway.log().count("Started server process") == 2
