"""Turns for the tests of the runners."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from wake.configuration import AgentConfiguration
from wake.heartbeats.runners import Exchange, Turn
from wake.models import RunnerKind
from wake.queue import ClaimedEvent

RUN_ID = UUID("0199f000-0000-7000-8000-000000000001")
EVENT = ClaimedEvent(
    pk=1,
    event_id=UUID("0199f000-0000-7000-8000-000000000002"),
    text="CI finished: 214 passed, größer",
    source="hook:ci",
    external=True,
    at=datetime(2026, 11, 22, 12, 30, tzinfo=UTC),
)


def command_turn(*command: str, prompt: str = "the prompt") -> Turn:
    """Return a turn for an agent whose runner is this command."""
    return _turn(prompt, runner=RunnerKind.COMMAND, command=command)


def http_turn(url: str, signing_secret: str, *, prompt: str = "the prompt") -> Turn:
    """Return a turn for an agent that is reached at this URL."""
    return _turn(prompt, runner=RunnerKind.HTTP, url=url, signing_secret=signing_secret)


def openclaw_turn(
    url: str,
    events: tuple[ClaimedEvent, ...],
    *,
    key_variable: str = "",
    session_key: str = "agent:main:discord:channel:123",
) -> Turn:
    """Return a turn with these events for an agent behind another gateway."""
    turn = _turn("the prompt", runner=RunnerKind.OPENCLAW, url=url, key_variable=key_variable)
    return replace(turn, events=events, session_key=session_key)


def chat_turn(
    url: str,
    *,
    prompt: str = "the prompt",
    transcript: tuple[Exchange, ...] = (),
    key_variable: str = "",
) -> Turn:
    """Return a turn for an agent whose model is served at this base URL."""
    turn = _turn(
        prompt, runner=RunnerKind.CHAT, url=url, model="llama3.2", key_variable=key_variable
    )
    return replace(turn, transcript=transcript)


def _turn(prompt: str, **agent: Any) -> Turn:
    return Turn(
        run_id=RUN_ID,
        agent=AgentConfiguration(id="main", **agent),
        session_key="agent:main:discord:channel:123",
        reason="wake",
        attempt=2,
        prompt=prompt,
        events=(EVENT,),
    )
