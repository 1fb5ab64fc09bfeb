"""A client that takes an agent's heartbeats and runs a program for each of them.

It attaches to the agent (docs/protocol.md), keeps the lease on every run while its program is
under way, says what came of it, and connects again by itself. It uses no database.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import msgspec
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as open_websocket
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from wake.configuration import AgentConfiguration
from wake.connecting import (
    CLOSE_SECONDS,
    MAX_MESSAGE_BYTES,
    STEP_SECONDS,
    connect_params,
    is_this_machine,
    websocket_url,
)
from wake.gateway.frames import Frame
from wake.gateway.scopes import WRITE
from wake.heartbeats.runners import Delivered, Failed, Outcome, Turn
from wake.heartbeats.runners.command import CommandRunner
from wake.models import RunnerKind
from wake.redaction import without_credentials

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS: Final = 0.5
LONGEST_PAUSE_SECONDS: Final = 30.0
# How long the gateway may take over what is given back at the end.
STOP_SECONDS: Final = 5.0
# A gateway that is gone without a word is noticed after at most twice this.
PING_SECONDS: Final = 10.0
# Fewer than the gateway answers at a time on one connection.
REQUESTS_AT_ONCE: Final = 32
RETRYABLE_STATUSES: Final = frozenset({408, 425, 429})


class Refused(Exception):
    """The gateway refuses this client, and another try cannot help; the text is one line."""


class RequestRefused(Exception):
    """The gateway answered a request with an error."""

    def __init__(self, error: _Error) -> None:
        super().__init__(error.message or "the gateway refused without a reason")
        self.is_for_good = error.code != "UNAVAILABLE"


# --- One connection -------------------------------------------------------------------------------


class _Error(Frame):
    code: str = ""
    message: str = ""


class _Received(Frame):
    """A response or an event."""

    type: str = ""
    id: str = ""
    ok: bool = False
    payload: msgspec.Raw = msgspec.Raw(b"null")
    error: _Error | None = None
    event: str = ""


class Link:
    """Requests and their answers on one connection; events go to `hear(name, payload)`."""

    def __init__(
        self, websocket: ClientConnection, hear: Callable[[str, msgspec.Raw], None]
    ) -> None:
        self._websocket = websocket
        self._hear = hear
        self._waiting: dict[str, asyncio.Future[msgspec.Raw]] = {}
        self._places = asyncio.Semaphore(REQUESTS_AT_ONCE)

    async def call(self, method: str, params: dict[str, Any]) -> Any:
        """Return the payload of the answer.

        Raises RequestRefused when it is an error, and ConnectionClosed.
        """
        request_id = str(uuid4())
        frame = {"type": "req", "id": request_id, "method": method, "params": params}
        answer = asyncio.get_running_loop().create_future()
        async with self._places:
            self._waiting[request_id] = answer
            try:
                await self._websocket.send(msgspec.json.encode(frame).decode())
                return msgspec.json.decode(await answer)
            finally:
                del self._waiting[request_id]

    async def read(self) -> None:
        """Take what the gateway sends until the connection ends. Raises ConnectionClosed."""
        try:
            while True:
                message = await self._websocket.recv()
                try:
                    self._take(msgspec.json.decode(message, type=_Received))
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                    logger.debug("a frame is not understood: %s", error)
        except ConnectionClosed as closed:
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(closed)
            raise

    def _take(self, received: _Received) -> None:
        if received.type == "event":
            self._hear(received.event, received.payload)
        elif (answer := self._waiting.get(received.id)) and not answer.done():
            if received.ok:
                answer.set_result(received.payload)
            else:
                answer.set_exception(RequestRefused(received.error or _Error()))


# --- Runs -----------------------------------------------------------------------------------------


class _Told(Frame):
    """What the event `heartbeat.run` says, as far as a program is told."""

    run_id: UUID
    agent_id: str
    session_key: str
    reason: str
    attempt: int
    prompt: str
    deadline_ms: int
    timeout_ms: int


class _Lost(Frame):
    run_id: UUID
    reason: str = ""


class _GivenUp(Enum):
    """Why a run is ended before its program has ended."""

    LOST = auto()
    STOPPING = auto()


@dataclass(eq=False)
class _Run:
    told: _Told
    given_up: asyncio.Future[_GivenUp] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def give_up(self, why: _GivenUp) -> None:
        if not self.given_up.done():
            self.given_up.set_result(why)


class AgentClient:
    """Takes heartbeats of one agent, `capacity` at a time, until `stop`.

    `report` is called with one line for each problem, `ready` once it is attached.
    """

    def __init__(
        self,
        url: str,
        token: str,
        agent_id: str,
        program: Sequence[str],
        *,
        capacity: int,
        report: Callable[[str], None],
        ready: Callable[[], None],
    ) -> None:
        self._url = websocket_url(url)
        self._token = token
        self._agent = AgentConfiguration(
            id=agent_id, runner=RunnerKind.COMMAND, command=tuple(program)
        )
        self._attachment = {"agentId": agent_id, "capacity": capacity}
        self._report = report
        self._ready = ready
        self._runner = CommandRunner()
        # What was lost and is being ended still takes its place.
        self._places = asyncio.Semaphore(capacity)
        self._runs: dict[UUID, _Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._was_attached = False
        self._is_attached = False

    def stop(self) -> None:
        """Ask it to end: programs under way are ended, and their runs given back."""
        self._stopping.set()
        for run in self._runs.values():
            run.give_up(_GivenUp.STOPPING)

    async def run(self) -> None:
        """Serve, connecting again and again, until stopped. Raises Refused."""
        self._check_url()
        pause = FIRST_PAUSE_SECONDS
        while not self._stopping.is_set():
            problem = await self._serve_until_stopped()
            if self._stopping.is_set():
                return
            if self._is_attached:
                pause, self._is_attached = FIRST_PAUSE_SECONDS, False
            wait = pause * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
            self._report(f"{problem}; trying again in {wait:.1f} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _check_url(self) -> None:
        try:
            parts = urlsplit(self._url)
            is_usable = parts.scheme in ("ws", "wss") and bool(parts.hostname)
            is_usable = is_usable and (parts.port is None or parts.port > 0)
        except ValueError:
            is_usable = False
        if not is_usable:
            raise Refused("the URL of a gateway looks like ws://HOST:PORT or wss://HOST")

    @property
    def _shown_url(self) -> str:
        return without_credentials(self._url)

    # --- One connection -------------------------------------------------------------------------

    async def _serve_until_stopped(self) -> str:
        """Serve on one connection and return why it ended. Raises Refused.

        A stop ends at once what is not attached yet; what is attached sees to it itself.
        """
        serving = asyncio.create_task(self._serve())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not self._is_attached:
                serving.cancel()
            await asyncio.wait({serving})
            return "" if serving.cancelled() else serving.result()
        finally:
            stopping.cancel()
            await _end(serving)

    async def _serve(self) -> str:
        try:
            async with self._connected() as (link, reading):
                await self._attach(link)
                stopping = asyncio.create_task(self._stopping.wait())
                try:
                    await asyncio.wait({reading, stopping}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    stopping.cancel()
                if not reading.done():
                    await self._give_back(link)
                    return ""
                await reading  # raises why the connection ended
                return ""
        except TimeoutError:
            return f"no answer from {self._shown_url} within {STEP_SECONDS:g} s"
        except ConnectionClosed as error:
            return f"{self._shown_url} closed the connection: {error}"
        except RequestRefused as error:
            if error.is_for_good:
                raise Refused(f"{self._shown_url} refused: {error}") from error
            return f"{self._shown_url} cannot take this client now: {error}"
        except InvalidStatus as error:
            status = error.response.status_code
            if 400 <= status < 500 and status not in RETRYABLE_STATUSES:
                raise Refused(f"cannot connect to {self._shown_url}: {error}") from error
            return f"cannot connect to {self._shown_url}: {error}"
        except (OSError, WebSocketException) as error:
            return f"cannot connect to {self._shown_url}: {error}"

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[tuple[Link, asyncio.Task[None]]]:
        """Open a connection, shake hands, and read from it; at the end, no run of it is left."""
        challenged = asyncio.Event()

        def hear(event: str, payload: msgspec.Raw) -> None:
            if event == "connect.challenge":
                challenged.set()
            else:
                self._hear(link, event, payload)

        async with open_websocket(
            self._url,
            open_timeout=STEP_SECONDS,
            close_timeout=CLOSE_SECONDS,
            ping_interval=PING_SECONDS,
            ping_timeout=PING_SECONDS,
            max_size=MAX_MESSAGE_BYTES,
            # A proxy of the environment cannot reach what is meant by this machine.
            proxy=None if is_this_machine(self._url) else True,
        ) as websocket:
            link = Link(websocket, hear)
            reading = asyncio.create_task(link.read())
            try:
                async with asyncio.timeout(STEP_SECONDS):
                    waiting = asyncio.create_task(challenged.wait())
                    await asyncio.wait({waiting, reading}, return_when=asyncio.FIRST_COMPLETED)
                    waiting.cancel()
                    await link.call("connect", connect_params(self._token, (WRITE,)))
                yield link, reading
            finally:
                for run in self._runs.values():
                    run.give_up(_GivenUp.LOST)
                await self._end_runs()
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    async def _attach(self, link: Link) -> None:
        async with asyncio.timeout(STEP_SECONDS):
            await link.call("agent.attach", self._attachment)
        self._is_attached = True
        if self._was_attached:
            self._report("attached again")
        else:
            self._was_attached = True
            self._ready()

    async def _give_back(self, link: Link) -> None:
        """Take no further run, and give back those under way."""
        with contextlib.suppress(ConnectionClosed, RequestRefused, TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await link.call("agent.detach", {"agentId": self._agent.id})
        await self._end_runs()

    async def _end_runs(self) -> None:
        """Wait until all runs have ended; they were given up. Cancelled, cut it short."""
        try:
            while self._tasks:
                await asyncio.wait(self._tasks)
        except asyncio.CancelledError:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            raise

    def _hear(self, link: Link, event: str, payload: msgspec.Raw) -> None:
        if event == "heartbeat.run":
            run = _Run(msgspec.json.decode(payload, type=_Told))
            self._runs[run.told.run_id] = run
            if self._stopping.is_set():
                run.give_up(_GivenUp.STOPPING)
            self._start(self._take(link, run))
        elif event == "heartbeat.lost":
            lost = msgspec.json.decode(payload, type=_Lost)
            if lost.run_id in self._runs:
                self._runs[lost.run_id].give_up(_GivenUp.LOST)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- One run --------------------------------------------------------------------------------

    async def _take(self, link: Link, run: _Run) -> None:
        """Run the program for one heartbeat, and say what came of it.

        1. Run it while the lease is kept; it is ended when the lease is lost, or this stops.
        2. Say so. What was lost is given back as well: the gateway refuses that, but hears that
           this client is there again, and it attaches anew.
        """
        program = asyncio.create_task(self._run_program(run.told))
        keeping = asyncio.create_task(self._keep_lease(link, run))
        ends: set[asyncio.Future[Any]] = {program, run.given_up}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _end(keeping)
            await _end(program)
            del self._runs[run.told.run_id]
        outcome = None if program.cancelled() else program.result()
        with contextlib.suppress(ConnectionClosed):
            await self._say(link, run.told, outcome)
            if outcome is None and not self._stopping.is_set():
                await link.call("agent.attach", self._attachment)

    async def _run_program(self, told: _Told) -> Outcome:
        turn = Turn(
            run_id=told.run_id,
            agent=self._agent,
            session_key=told.session_key,
            reason=told.reason,
            attempt=told.attempt,
            prompt=told.prompt,
            events=(),
            limit=told.timeout_ms / 1000,
        )
        try:
            async with asyncio.timeout(turn.limit), self._places:
                return await self._runner.run(turn)
        except TimeoutError:
            return Failed(f"no answer within {turn.limit:g} s")
        except Exception as error:
            logger.exception("run %s: defect", told.run_id)
            return Failed(f"the agent client failed: {type(error).__name__}: {error}")

    async def _keep_lease(self, link: Link, run: _Run) -> None:
        """Extend the lease at each third of it, as far as the run's time limit; give up when it is
        lost."""
        clock = asyncio.get_running_loop().time
        limit_at = clock() + run.told.timeout_ms / 1000
        lease = run.told.deadline_ms / 1000
        lease_until = clock() + lease
        while lease_until < limit_at:
            await asyncio.sleep(lease / 3)
            asked_at = clock()
            try:
                async with asyncio.timeout_at(lease_until):
                    answer = await link.call("heartbeat.progress", {"runId": str(run.told.run_id)})
            except RequestRefused as refused:
                if refused.is_for_good:
                    break
                continue
            except (TimeoutError, ConnectionClosed):
                break
            lease = answer["deadlineMs"] / 1000
            lease_until = asked_at + lease
        else:
            return
        run.give_up(_GivenUp.LOST)

    async def _say(self, link: Link, told: _Told, outcome: Outcome | None) -> None:
        """Tell the gateway how a run ended, None where its program was ended.

        Raises ConnectionClosed.
        """
        said: dict[str, Any] = {"runId": str(told.run_id), "status": "returned"}
        if isinstance(outcome, Delivered):
            said |= {"status": "delivered", "reply": outcome.reply}
        elif isinstance(outcome, Failed):
            said |= {"status": "failed", "error": outcome.error}
            self._report(f"run {told.run_id} of {told.session_key} failed; the gateway has why")
        try:
            await link.call("heartbeat.done", said)
        except RequestRefused as refused:
            what = "its program was ended" if outcome is None else "its answer was refused"
            self._report(f"run {told.run_id} of {told.session_key}: {what}: {refused}")


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for its end; cancel it once more when this is cancelled meanwhile."""
    task.cancel()
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task})
        raise
