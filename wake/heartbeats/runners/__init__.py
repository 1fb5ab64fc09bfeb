"""Runners: how an agent is reached when a heartbeat is due. One file each behind one interface.

A runner gets a turn and gives an outcome. It neither touches the database nor decides about
retries: the loop settles what it answers. To add one, write its file, add its kind to
`wake.models.RunnerKind` and its class to `RUNNERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import Final, Protocol
from uuid import UUID

from wake.configuration import AgentConfiguration
from wake.models import RunnerKind
from wake.queue import ClaimedEvent

# A longer reply or error is cut before it is stored.
MAX_REPLY_BYTES: Final = 256 * 1024
MAX_ERROR_CHARACTERS: Final = 4000


@dataclass(frozen=True, slots=True)
class Turn:
    """What an agent is handed: one heartbeat of one session."""

    run_id: UUID
    agent: AgentConfiguration
    session_key: str
    reason: str
    attempt: int
    prompt: str
    events: tuple[ClaimedEvent, ...]


@dataclass(frozen=True, slots=True)
class Delivered:
    """The agent took the turn; `reply` is what it said, at most MAX_REPLY_BYTES in UTF-8."""

    reply: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """The agent did not take the turn. `permanent`: another try cannot help."""

    error: str
    permanent: bool = False
    retry_after: timedelta | None = None


Outcome = Delivered | Failed


class Runner(Protocol):
    """One way to reach an agent. One instance serves all heartbeats of a loop at the same time."""

    async def run(self, turn: Turn) -> Outcome:
        """Hand the turn over and return how it ended, within the agent's `timeout`.

        When it is cancelled (the lease was lost, the process stops) it must end what it started
        before it lets the cancellation pass.
        """

    async def close(self) -> None:
        """Let go of what the instance holds; no run is under way."""


# By module and class name, so that a kind that nobody uses is not imported.
RUNNERS: Final[Mapping[RunnerKind, str]] = {
    RunnerKind.COMMAND: "command.CommandRunner",
    RunnerKind.HTTP: "http.HttpRunner",
}


def make_runner(kind: RunnerKind) -> Runner:
    """Return a new runner of this kind. The kind `none` has none: its heartbeats never run."""
    module_name, class_name = RUNNERS[kind].split(".")
    module = import_module(f"{__name__}.{module_name}")
    runner: Runner = getattr(module, class_name)()
    return runner


def cut(text: str, max_bytes: int = MAX_REPLY_BYTES) -> str:
    """Return text as it can be stored: at most `max_bytes` in UTF-8, without NUL characters."""
    encoded = text.replace("\0", "\ufffd").encode("utf-8", "replace")
    return encoded[:max_bytes].decode("utf-8", "ignore")
