"""The transcript of a session, read from its heartbeats."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wake.heartbeats import transcripts
from wake.heartbeats.runners import Exchange
from wake.models import Agent, GatewaySettings, Heartbeat, Session

pytestmark = pytest.mark.django_db

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
PLENTY = 1024 * 1024


@pytest.fixture
def session() -> Session:
    GatewaySettings.ensure()
    return new_session("agent:main:x")


def new_session(key: str) -> Session:
    return Session.objects.create(agent=Agent.objects.get(pk="main"), key=key)


def heartbeat(session: Session, prompt: str = "asked", reply: str = "said", **fields: Any) -> None:
    values: dict[str, Any] = {"runner": "chat", "status": "delivered", "event_count": 1}
    Heartbeat.objects.create(
        run_id=uuid4(),
        session=session,
        reason="wake",
        started_at=NOW,
        prompt=prompt,
        reply=reply,
        **(values | fields),
    )


def test_a_new_session_has_none(session: Session) -> None:
    assert transcripts.read(session.pk, PLENTY) == ()


def test_exchanges_come_oldest_first_and_of_this_session_alone(session: Session) -> None:
    other = new_session("agent:main:y")
    for number in range(3):
        heartbeat(session, f"asked {number}", f"said {number}")
        heartbeat(other, "asked elsewhere", "said elsewhere")
    assert transcripts.read(session.pk, PLENTY) == (
        Exchange("asked 0", "said 0"),
        Exchange("asked 1", "said 1"),
        Exchange("asked 2", "said 2"),
    )


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"status": "delivered"}, True),
        ({"status": "quiet"}, True),
        ({"status": "delivered", "event_count": 0}, True),
        ({"status": "quiet", "event_count": 0}, False),
        ({"status": "running"}, False),
        ({"status": "failed"}, False),
        ({"status": "lost"}, False),
        ({"status": "released"}, False),
        ({"runner": "command"}, False),
        ({"runner": ""}, False),
        ({"reply": ""}, False),
        ({"reply": " \n"}, False),
    ],
)
def test_what_is_an_exchange(session: Session, fields: dict[str, Any], kept: bool) -> None:
    heartbeat(session, **fields)
    assert bool(transcripts.read(session.pk, PLENTY)) == kept


@pytest.mark.parametrize(
    ("max_bytes", "kept"), [(-1, 0), (0, 0), (9, 0), (10, 1), (19, 1), (20, 2), (30, 3), (99, 3)]
)
def test_the_oldest_are_left_out_first_and_none_is_cut(
    session: Session, max_bytes: int, kept: int
) -> None:
    for number in range(3):
        heartbeat(session, f"größe {number}"[:5], "äb")
    # "größe" is 7 bytes, "äb" is 3.
    assert transcripts.read(session.pk, max_bytes) == (Exchange("größe", "äb"),) * kept


def test_nothing_is_taken_from_before_one_that_does_not_fit(session: Session) -> None:
    heartbeat(session, "old", "fits")
    heartbeat(session, "x" * 1000, "too long")
    heartbeat(session, "new", "fits")
    assert transcripts.read(session.pk, 500) == (Exchange("new", "fits"),)


def test_there_is_a_most_of_exchanges_and_of_heartbeats_looked_at(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(230):
        heartbeat(session, str(number))
    assert [exchange.prompt for exchange in transcripts.read(session.pk, PLENTY)] == [
        str(number) for number in range(30, 230)
    ]
    monkeypatch.setattr(transcripts, "MAX_HEARTBEATS", 60)
    for _ in range(10):
        heartbeat(session, status="quiet", event_count=0)
    assert [exchange.prompt for exchange in transcripts.read(session.pk, PLENTY)] == [
        str(number) for number in range(180, 230)
    ]


def test_no_more_texts_are_read_than_are_returned(session: Session) -> None:
    for _ in range(100):
        heartbeat(session, "p" * 1000, "r" * 1000)
    with CaptureQueriesContext(
        connection,
    ) as queries:
        assert len(transcripts.read(session.pk, 4000)) == 2
    lookback, lengths, texts = (query["sql"] for query in queries)
    assert " OFFSET 999" in lookback
    assert lengths.startswith('SELECT "wake_heartbeat"."id" AS "pk", (')
    assert " LIMIT 25" in lengths
    assert texts.startswith('SELECT "wake_heartbeat"."prompt" AS "prompt", ')
    assert " LIMIT 25" not in texts


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20),
            st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20),
        ),
        max_size=60,
    ),
    max_bytes=st.integers(0, 2000),
)
def test_it_is_the_longest_end_of_the_conversation_that_fits(
    session: Session, texts: list[tuple[str, str]], max_bytes: int
) -> None:
    Heartbeat.objects.all().delete()
    for prompt, reply in texts:
        heartbeat(session, prompt, reply)
    said = [Exchange(*pair) for pair in texts if pair[1]]
    size = 0
    kept: list[Exchange] = []
    for exchange in reversed(said):
        size += len(exchange.prompt.encode()) + len(exchange.reply.encode())
        if size > max_bytes:
            break
        kept.insert(0, exchange)
    expected = tuple(exchange for exchange in kept if exchange.reply.strip())
    assert transcripts.read(session.pk, max_bytes) == (expected if max_bytes else ())
