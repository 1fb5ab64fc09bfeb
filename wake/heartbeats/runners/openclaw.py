"""The openclaw runner: each event of a turn goes to another gateway, in order, by its `wake`.

So an installation that exists gets this gateway's durability, policy and signatures in front of
it. All agents with the same URL and token share one connection, on which the requests of different
turns are under way side by side; within a turn the next event is sent when the one before it was
taken.

* While the connection is not up, there are no places: events wait, and count no attempts.
* When it breaks in the middle of a turn, the rest of the turn comes back. The event whose answer
  was lost is sent again: better twice than never.
* A refusal is about one event, and permanent. All else that goes wrong is tried again.

Proxies and certificates come from the environment (HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE); a
gateway on this machine is never reached through a proxy.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import ssl
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, NoReturn, TypeVar
from uuid import uuid4

import msgspec
from django.utils.crypto import salted_hmac
from msgspec import Raw
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as open_websocket
from websockets.exceptions import (
    ConnectionClosed,
    InvalidProxyStatus,
    InvalidStatus,
    InvalidURI,
    WebSocketException,
)

from wake.configuration import AgentConfiguration
from wake.connecting import (
    CLOSE_SECONDS,
    MAX_MESSAGE_BYTES,
    connect_params,
    is_this_machine,
    websocket_url,
)
from wake.errors import KeyUnavailable
from wake.heartbeats.prompt import frame_external
from wake.heartbeats.runners import (
    MAX_ERROR_CHARACTERS,
    Delivered,
    Failed,
    Outcome,
    Reach,
    Returned,
    Runner,
    Turn,
    cut,
)
from wake.heartbeats.runners.keys import read_key
from wake.presentation import one_line
from wake.queue import ClaimedEvent
from wake.redaction import without_credentials

logger = logging.getLogger(__name__)

SCOPE: Final = "operator.write"
SCOPES_THAT_SUFFICE: Final = frozenset({SCOPE, "operator.admin"})
# Close codes that say that what we sent could not be read: another try counts as one.
CLOSED_FOR_WHAT_WAS_SENT: Final = frozenset({1003, 1007, 1009})
MAX_RETRY_AFTER_MS: Final = 24 * 3600 * 1000
DEFAULT_TICK_SECONDS: Final = 30.0
MAX_TICK_SECONDS: Final = 3600.0
MISSED_TICKS: Final = 2

S = TypeVar("S", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class Pace:
    """How long to wait for what, in seconds. Waits between attempts are cut by up to a half."""

    step: float = 10.0
    request: float = 60.0
    shutdown: float = 5.0
    first_retry: float = 0.5
    longest_retry: float = 10.0
    refused_retry: float = 30.0


class OpenClawRunner(Runner):
    """Forwards turns over one connection for each URL and token variable."""

    def __init__(
        self, look_again: Callable[[], None] = lambda: None, *, pace: Pace | None = None
    ) -> None:
        super().__init__(look_again)
        self._pace = pace or Pace()
        self._upstreams: dict[tuple[str, str], _Upstream] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    def keep(self, agents: Collection[AgentConfiguration]) -> None:
        """Open the connections that these agents need; let go of the others."""
        wanted = {_address(agent) for agent in agents}
        for address in self._upstreams.keys() - wanted:
            leaving = asyncio.create_task(self._upstreams.pop(address).leave())
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
        for address in wanted - self._upstreams.keys():
            self._upstreams[address] = _Upstream(*address, self.look_again, self._pace)

    def places(self, agent: AgentConfiguration) -> int | None:
        """Return 0 while the agent's gateway is away."""
        upstream = self._upstreams.get(_address(agent))
        return None if upstream and upstream.is_up else 0

    def reach(self, agent: AgentConfiguration) -> Reach:
        """Return why the agent's gateway is not reached, if it is not."""
        upstream = self._upstreams.get(_address(agent))
        return Reach(problem=upstream.problem if upstream else "not connected yet")

    async def run(self, turn: Turn) -> Outcome:
        """Forward the events of the turn one after the other.

        The loop ends the run at its limit without asking how far it came. So it is over a little
        earlier, and what there is no time for comes back.
        """
        clock = asyncio.get_running_loop().time
        give_up_at = clock() + turn.limit - min(5.0, turn.limit / 10)
        enough = min(self._pace.request, turn.limit / 2)
        for taken, event in enumerate(turn.events):
            upstream = self._upstreams.get(_address(turn.agent))
            seconds = give_up_at - clock()
            if upstream is None or (taken and seconds < enough):
                return Returned(taken)
            try:
                answer = await upstream.call("wake", wake_params(turn, event), seconds)
            except _ConnectionLost:
                return Returned(taken)
            except _NoAnswer as error:
                return Failed(str(error), handed_over=taken)
            except asyncio.CancelledError:
                # The process stops: the other gateway need not be told again what it took.
                if taken:
                    return Returned(taken)
                raise
            if failed := failure(answer, without_credentials(turn.agent.url), taken):
                return failed
        return Delivered()

    async def close(self) -> None:
        """Close the connections."""
        self.keep([])
        await asyncio.gather(*self._leaving, return_exceptions=True)


def _address(agent: AgentConfiguration) -> tuple[str, str]:
    return agent.url, agent.key_variable


def wake_params(turn: Turn, event: ClaimedEvent) -> dict[str, str]:
    """Return the params of the `wake` that forwards an event."""
    text = event.text
    if event.external:
        # Nobody outside can guess it, and a repeat has the same: a gateway that still holds the
        # event takes the two for one.
        token = salted_hmac("wake.openclaw", str(event.event_id), algorithm="sha256")
        text = frame_external(text, token.hexdigest()[:16])
    return {
        "mode": "now",
        "text": text,
        "sessionKey": turn.session_key,
        # Without it the key of an agent that is not the default one there would be refused.
        "agentId": turn.agent.id,
    }


# --- What is answered -----------------------------------------------------------------------------


class Answer(msgspec.Struct):
    """A frame of the other gateway, as far as it matters here; its fields may hold anything."""

    type: Any = None
    id: Any = None
    event: Any = None
    ok: Any = None
    payload: Raw = Raw(b"null")
    error: Raw = Raw(b"null")


class _Error(msgspec.Struct, rename="camel"):
    code: str = ""
    message: str = ""
    details: Any = None
    retryable: Any = False
    retry_after_ms: Any = None

    @property
    def words(self) -> str:
        """The other gateway's own words, on one line."""
        return _short(self.message or self.code or "it refused without a reason")

    @property
    def is_passing(self) -> bool:
        return self.retryable is True or self.code == "UNAVAILABLE"

    @property
    def is_about_scopes(self) -> bool:
        return self.code == "FORBIDDEN" or self.message.startswith("missing scope")

    @property
    def detail_code(self) -> str:
        code = self.details.get("code") if isinstance(self.details, dict) else ""
        return code if isinstance(code, str) else ""

    @property
    def retry_after(self) -> timedelta | None:
        wait = self.retry_after_ms
        if isinstance(wait, bool) or not isinstance(wait, int | float) or wait <= 0:
            return None
        return timedelta(milliseconds=min(wait, MAX_RETRY_AFTER_MS))


class _Receipt(msgspec.Struct):
    ok: Any = None
    error: Any = None


class _Policy(msgspec.Struct, rename="camel"):
    tick_interval_ms: Any = None


class _Granted(msgspec.Struct):
    scopes: list[str] | None = None


class _Hello(msgspec.Struct, tag_field="type", tag="hello-ok"):
    policy: _Policy | None = None
    auth: _Granted | None = None

    @property
    def tick_seconds(self) -> float:
        """How often the gateway says that it is there."""
        interval = self.policy.tick_interval_ms if self.policy else None
        if isinstance(interval, bool) or not isinstance(interval, int | float) or interval <= 0:
            return DEFAULT_TICK_SECONDS
        return min(interval / 1000, MAX_TICK_SECONDS)

    @property
    def lets_events_in(self) -> bool:
        """Whether the scope suffices, as far as the gateway says."""
        scopes = self.auth.scopes if self.auth else None
        return scopes is None or bool(SCOPES_THAT_SUFFICE & {*scopes})


def failure(answer: Answer, shown_url: str, taken: int) -> Failed | None:
    """Return what went wrong with the event after the first `taken`; None: it was taken too. Pure.

    The reason of a refusal is in the other gateway's words.
    """
    if answer.ok is True:
        receipt = _decoded(answer.payload, _Receipt)
        if receipt is None or receipt.ok is not False:
            return None
        said = receipt.error if isinstance(receipt.error, str) else ""
        error: _Error | None = _Error(message=said)
    else:
        error = _decoded(answer.error, _Error) if answer.ok is False else None
    if error is None:
        return Failed(f"{shown_url} answered what makes no sense", handed_over=taken)
    if error.is_passing or error.is_about_scopes:
        return Failed(error.words, retry_after=error.retry_after, handed_over=taken)
    return Failed(error.words, permanent=True, handed_over=taken, is_about_one=True)


def _decoded(data: Raw, expected: type[S]) -> S | None:
    """Return what the JSON holds, or None where it is something else."""
    try:
        return msgspec.json.decode(data, type=expected)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None


def _short(text: str) -> str:
    return cut(one_line(text), MAX_ERROR_CHARACTERS)


# --- The connection -------------------------------------------------------------------------------


class _ConnectionLost(Exception):
    """There is no connection, or there is none any more."""


class _NoAnswer(Exception):
    """A request was not answered, and is to blame for it; the text is for a person."""


class _Away(Exception):
    """Why the gateway cannot be reached now.

    `problem` may be logged; what the gateway `said` may not. `slow`: it will hardly change soon.
    """

    def __init__(self, problem: str, said: str = "", *, slow: bool = False) -> None:
        super().__init__(problem)
        self.problem = problem
        self.said = _short(said)
        self.slow = slow


class _Upstream:
    """A gateway, and the connection to it, which is opened again and again until `leave`."""

    def __init__(
        self, url: str, key_variable: str, look_again: Callable[[], None], pace: Pace
    ) -> None:
        self._url = url
        self._key_variable = key_variable
        self._look_again = look_again
        self._pace = pace
        self._named = f"its gateway {without_credentials(url)}"
        self.problem = f"{self._named} is not connected yet"
        # As long as requests may be sent.
        self._connection: ClientConnection | None = None
        self._waiting: dict[str, asyncio.Future[Answer]] = {}
        # Ends the connection when it runs out; then `_ending` says why, or it was silence.
        self._timer: asyncio.Timeout | None = None
        self._ending = ""
        self._serving = asyncio.create_task(self._serve())

    @property
    def is_up(self) -> bool:
        return self._connection is not None

    async def call(self, method: str, params: object, seconds: float) -> Answer:
        """Send a request and return the answer to it.

        Raises _NoAnswer when there is none within `seconds`, and _ConnectionLost. A gateway that
        is asked for longer than it may take is connected anew.
        """
        connection = self._connection
        if connection is None:
            raise _ConnectionLost
        request_id = str(uuid4())
        frame = {"type": "req", "id": request_id, "method": method, "params": params}
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = answered
        seconds = min(seconds, self._pace.request)
        try:
            async with asyncio.timeout(seconds):
                await connection.send(msgspec.json.encode(frame).decode())
                return await answered
        except TimeoutError:
            if seconds == self._pace.request:
                self._end("left a request without an answer", after=0)
            waited = f"{round(seconds, 1):g} s"
            raise _NoAnswer(f"{self._named} did not answer within {waited}") from None
        except ConnectionClosed as closed:
            # Who reads may learn of it later; nothing is to be claimed for it meanwhile.
            if self._connection is connection:
                self._connection = None
            raise _lost(self._named, closed) from None
        finally:
            answered.cancel()
            del self._waiting[request_id]

    async def leave(self) -> None:
        """Take no more requests, wait for the answers to those under way, and close."""
        self._connection = None
        if self._waiting:
            await asyncio.wait(list(self._waiting.values()), timeout=self._pace.request)
        self._serving.cancel()
        await asyncio.wait([self._serving])

    async def _serve(self) -> None:
        """Keep the connection up; between two attempts wait, ever longer while they fail."""
        clock = asyncio.get_running_loop().time
        failures = 0
        while True:
            began = clock()
            try:
                await self._stay_connected()
            except _Away as away:
                self._note(away)
                slow = away.slow
            except Exception as error:
                # A defect must not leave the events of these agents waiting for ever.
                self._note(_Away(f"{self._named} is away: {type(error).__name__}"))
                logger.debug("openclaw: a connection failed", exc_info=error)
                slow = True
            # One that does not last is no success.
            failures = 0 if clock() - began > self._pace.longest_retry else failures + 1
            wait = self._pace.refused_retry
            if not slow:
                longer = 2.0 ** min(max(0, failures - 1), 16)
                wait = min(self._pace.first_retry * longer, self._pace.longest_retry)
            await asyncio.sleep(wait * random.uniform(0.5, 1))  # noqa: S311 - not a secret

    def _note(self, away: _Away) -> None:
        problem = f"{away.problem}: {away.said}" if away.said else away.problem
        if problem != self.problem:
            logger.warning("openclaw: %s", away.problem)
            self.problem = problem

    async def _stay_connected(self) -> NoReturn:
        """Connect, shake hands, and take what comes. Raises _Away, when it is over."""
        try:
            token = read_key(self._key_variable)
        except KeyUnavailable as error:
            raise _Away(str(error), slow=True) from error
        try:
            async with open_websocket(
                websocket_url(self._url),
                open_timeout=self._pace.step,
                close_timeout=CLOSE_SECONDS,
                max_size=MAX_MESSAGE_BYTES,
                proxy=None if is_this_machine(self._url) else True,
            ) as connection:
                async with asyncio.timeout(self._pace.step):
                    hello = await self._shake_hands(connection, token)
                try:
                    await self._take_frames(connection, MISSED_TICKS * hello.tick_seconds)
                finally:
                    self._connection = self._timer = None
        except ConnectionClosed as closed:
            self._lose_all(_lost(self._named, closed))
            said = closed.rcvd.reason if closed.rcvd else ""
            raise _Away(f"{self._named} is away: it closed the connection", said) from None
        except (OSError, WebSocketException, ValueError, ImportError) as error:
            is_invalid = isinstance(error, ValueError | InvalidURI | ImportError)
            raise _Away(f"{self._named} is away: {self._reason(error)}", slow=is_invalid) from None
        finally:
            self._lose_all(_ConnectionLost())

    async def _shake_hands(self, connection: ClientConnection, token: str) -> _Hello:
        """Return the hello. Raises _Away when it is refused or does not let events in."""
        while self._decode(await connection.recv()).event != "connect.challenge":
            pass
        request_id = str(uuid4())
        params = connect_params(token, (SCOPE,))
        frame = {"type": "req", "id": request_id, "method": "connect", "params": params}
        await connection.send(msgspec.json.encode(frame).decode())
        answer = self._decode(await connection.recv())
        while answer.type != "res" or answer.id not in (request_id, "invalid"):
            answer = self._decode(await connection.recv())
        if answer.ok is not True:
            error = _decoded(answer.error, _Error) or _Error()
            what = "the token" if error.detail_code.startswith("AUTH_") else "the connection"
            raise _Away(f"{self._named} refused {what}", error.words, slow=not error.is_passing)
        hello = _decoded(answer.payload, _Hello)
        if hello is None:
            raise _Away(f"{self._named} answered what makes no sense", slow=True)
        if not hello.lets_events_in:
            raise _Away(f"{self._named} gives the token no scope {SCOPE}", slow=True)
        return hello

    async def _take_frames(self, connection: ClientConnection, silence: float) -> NoReturn:
        """Take what comes until there is nothing for `silence` seconds, or an end was asked for."""
        clock = asyncio.get_running_loop().time
        self._ending = ""
        try:
            async with asyncio.timeout(silence) as self._timer:
                self._connection, self.problem = connection, ""
                logger.info("openclaw: %s is connected", self._named)
                self._look_again()
                while True:
                    self._take(await connection.recv())
                    if not self._ending:
                        self._timer.reschedule(clock() + silence)
        except TimeoutError:
            why = self._ending or f"said nothing for {silence:g} s"
            raise _Away(f"{self._named} is away: it {why}") from None

    def _take(self, message: str | bytes) -> None:
        try:
            frame = self._decode(message)
        except _Away as away:
            # It may be an answer: who always answers like that must not be asked for ever.
            self._lose_all(_NoAnswer(away.problem))
            raise
        if frame.type == "res":
            answered = self._waiting.get(frame.id) if isinstance(frame.id, str) else None
            # Nobody waits for what comes late, or twice.
            if answered and not answered.done():
                answered.set_result(frame)
        elif frame.event == "shutdown":
            # The answers to what is under way may still come.
            self._end("shuts down", after=self._pace.shutdown)

    def _end(self, why: str, *, after: float) -> None:
        """Send no more requests, and close the connection after so many seconds."""
        if self._timer and not self._timer.expired() and not self._ending:
            self._connection, self._ending = None, why
            self._note(_Away(f"{self._named} is away: it {why}"))
            self._timer.reschedule(asyncio.get_running_loop().time() + after)

    def _lose_all(self, error: Exception) -> None:
        """Tell those who wait for answers that there will be none."""
        for answered in self._waiting.values():
            if not answered.done():
                answered.set_exception(error)

    def _decode(self, message: str | bytes) -> Answer:
        """Return a frame, an empty one for what has another shape. Raises _Away for no JSON."""
        try:
            return msgspec.json.decode(message, type=Answer)
        except msgspec.ValidationError:
            return Answer()
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            raise _Away(f"{self._named} is away: it sent something that is not JSON") from None

    def _reason(self, error: Exception) -> str:
        """Return what went wrong, in words of ours: the library's may quote a URL."""
        match error:
            case TimeoutError():
                return f"no answer within {self._pace.step:g} s"
            case InvalidStatus():
                return f"it answered HTTP {error.response.status_code}"
            case InvalidProxyStatus():
                return f"the proxy answered HTTP {error.response.status_code}"
            case ssl.SSLCertVerificationError():
                return f"its certificate is not valid: {error.verify_message}"
            case ssl.SSLError() | socket.gaierror():
                return str(error.strerror or error)
            case OSError(errno=int(number)):
                return os.strerror(number).lower()
            case OSError():
                return str(error)
            case ValueError() | InvalidURI():
                return "the URL is not valid"
            case ImportError():
                return "the proxy of the environment is of a kind that needs another library"
        return f"it does not answer as a WebSocket does ({type(error).__name__})"


def _lost(named: str, closed: ConnectionClosed) -> _ConnectionLost | _NoAnswer:
    if closed.rcvd and closed.rcvd.code in CLOSED_FOR_WHAT_WAS_SENT:
        words = _short(closed.rcvd.reason) or f"code {closed.rcvd.code}"
        return _NoAnswer(f"{named} closed the connection instead of an answer: {words}")
    return _ConnectionLost()
