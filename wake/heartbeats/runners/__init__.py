"""Runners: how an agent is reached when a heartbeat is due. One file each behind one interface.

A runner gets a turn and gives an outcome. It neither touches the database nor decides about
retries: the loop settles what it answers. To add one, write its file, add its kind to
`wake.models.RunnerKind` and its class to `RUNNERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import Final
from uuid import UUID

from wake.configuration import AgentConfiguration
from wake.configuration import Reach as Reach
from wake.models import RunnerKind
from wake.queue import ClaimedEvent

# A longer reply or error is cut before it is stored.
MAX_REPLY_BYTES: Final = 256 * 1024
MAX_ERROR_CHARACTERS: Final = 4000


@dataclass(frozen=True, slots=True)
class Exchange:
    """One earlier turn of a session: what its agent was given, and what it said."""

    prompt: str
    reply: str


@dataclass(frozen=True, slots=True)
class Turn:
    """What an agent is handed: one heartbeat of one session.

    `limit` is how many seconds it may take; the loop ends it then. `transcript` holds the earlier
    turns of the session, the oldest first, for the runners that send them along (`chat`).
    """

    run_id: UUID
    agent: AgentConfiguration
    session_key: str
    reason: str
    attempt: int
    prompt: str
    events: tuple[ClaimedEvent, ...]
    limit: float = 600.0
    transcript: tuple[Exchange, ...] = ()


@dataclass(frozen=True, slots=True)
class Delivered:
    """The agent took the turn; `reply` is what it said, at most MAX_REPLY_BYTES in UTF-8."""

    reply: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """The agent did not take the turn. `permanent`: another try cannot help.

    A runner that hands events over one by one says how far it came: the first `handed_over` of the
    turn's events were taken. The failure is about the next one alone where it `is_about_one`, else
    about all the rest.
    """

    error: str
    permanent: bool = False
    retry_after: timedelta | None = None
    handed_over: int = 0
    is_about_one: bool = False


@dataclass(frozen=True, slots=True)
class Lost:
    """Who had the turn is gone. The events are due again at once; it counts as an attempt."""

    error: str


@dataclass(frozen=True, slots=True)
class Returned:
    """The turn came back undone, as if it had not been given: it does not count as an attempt.

    The first `handed_over` of its events were taken, and do not come back.
    """

    handed_over: int = 0


Outcome = Delivered | Failed | Lost | Returned


class Runner:
    """One way to reach an agent. One instance serves all heartbeats of a loop at the same time.

    All methods are called on the loop's event loop. `look_again` may be called at any time to say
    that `places` may have grown.
    """

    def __init__(self, look_again: Callable[[], None] = lambda: None) -> None:
        self.look_again = look_again

    def keep(self, agents: Collection[AgentConfiguration]) -> None:
        """Take note of the agents of this kind that are to be reached, before each claim.

        A runner that holds connections opens and closes them accordingly, in the background.
        """

    def places(self, agent: AgentConfiguration) -> int | None:
        """Return how many turns of the agent can be under way here; None: any number.

        While it is 0, the agent's events wait and count no attempts.
        """
        return None

    def reach(self, agent: AgentConfiguration) -> Reach | None:
        """Return how the agent is reached from here, or None where every process can."""
        return None

    async def run(self, turn: Turn) -> Outcome:
        """Hand the turn over and return how it ended, within its `limit`.

        When it is cancelled (the lease was lost, the process stops) it must end what it started
        before it lets the cancellation pass.
        """
        raise NotImplementedError

    def settled(self, run_id: UUID, *, is_kept: bool) -> None:
        """Take note that the loop is done with a turn that was handed over.

        `is_kept` says whether its outcome is stored: it is not if the lease was lost by then.
        """

    async def close(self) -> None:
        """Let go of what the instance holds; no run is under way."""


# By module and class name, so that a kind that nobody uses is not imported.
RUNNERS: Final[Mapping[RunnerKind, str]] = {
    RunnerKind.COMMAND: "command.CommandRunner",
    RunnerKind.HTTP: "http.HttpRunner",
    RunnerKind.INBOX: "inbox.InboxRunner",
    RunnerKind.OPENCLAW: "openclaw.OpenClawRunner",
    RunnerKind.CHAT: "chat.ChatRunner",
}


def make_runner(kind: RunnerKind, look_again: Callable[[], None]) -> Runner:
    """Return a new runner of this kind. The kind `none` has none: its heartbeats never run."""
    module_name, class_name = RUNNERS[kind].split(".")
    module = import_module(f"{__name__}.{module_name}")
    runner: Runner = getattr(module, class_name)(look_again)
    return runner


def cut(text: str, max_bytes: int = MAX_REPLY_BYTES) -> str:
    """Return text as it can be stored: at most `max_bytes` in UTF-8, without NUL characters."""
    encoded = text.replace("\0", "\ufffd").encode("utf-8", "replace")
    return encoded[:max_bytes].decode("utf-8", "ignore")
