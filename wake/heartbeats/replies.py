"""Posting replies: what a run said goes to its agent's reply URL, signed, until it was taken.

A reply is on its way (`ReplyPost`) from the transaction that settles its run. Any number of
posters, in any number of processes, share the work: an attempt first moves the time at which the
post is due ahead by a lease, in an UPDATE that only one of them wins. That time is the token
too: who died is followed by another one when it has come, and who is late finds it changed.

So a reply is posted at least once, and its `webhook-id`, the run id, tells a repeat. An answer
means what it means to the http runner. Where replies go, and the secret, are read at each attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar
from uuid import UUID

import msgspec
from django.db import DatabaseError, connections, transaction
from django.db.models import F, Min, Q, QuerySet
from django.utils import timezone

from wake import configuration, doorbell, metrics
from wake.heartbeats.runners import (
    MAX_ERROR_CHARACTERS,
    Delivered,
    Failed,
    Returned,
    cut,
)
from wake.models import Heartbeat, ReplyPost, ReplyState
from wake.queue import RETRY_AFTER_LIMIT, backoff
from wake.threads import call_in

if TYPE_CHECKING:
    from wake.heartbeats.runners.http_client import Client

logger = logging.getLogger(__name__)

MAX_ATTEMPTS: Final = 8
TIME_LIMIT_SECONDS: Final = 30.0
# Longer than an attempt takes, with what is to be written before and after it.
LEASE: Final = timedelta(seconds=60)
POSTS_AT_ONCE: Final = 8
# The slow poll behind the doorbell; and how close together the doorbell makes it look, where an
# agent has a reply URL.
POLL_SECONDS: Final = 1.0
LOOK_SECONDS: Final = 0.1
STOP_SECONDS: Final = 5.0
DATABASE_RETRY_SECONDS: Final = 1.0

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a post: `body` goes to `url`. It is this process's until `lease_until`."""

    pk: int
    number: int
    lease_until: datetime
    agent_id: str
    run_id: UUID
    url: str
    secret: str = field(repr=False)
    body: bytes = field(repr=False)


# --- What is stored -----------------------------------------------------------------------------


def queue_reply(run_id: UUID, *, now: datetime) -> None:
    """Have a run's reply posted. Called in the transaction that settles the run, which rings."""
    heartbeat_id = Heartbeat.objects.values_list("pk", flat=True).get(run_id=run_id)
    ReplyPost.objects.create(heartbeat_id=heartbeat_id, due_at=now, created_at=now)


def begin_attempts(*, now: datetime, limit: int) -> list[Attempt]:
    """Begin up to `limit` attempts that are due, the longest due first."""
    # What lies further ahead than any wait comes from a clock that was set back, or from a machine
    # whose clock runs ahead.
    due = Q(due_at__lte=now) | Q(due_at__gt=now + RETRY_AFTER_LIMIT)
    waiting = ReplyPost.objects.filter(due, state=ReplyState.PENDING).order_by("due_at", "pk")
    # Read outside the transaction, which on SQLite keeps all others from writing.
    found = sorted(waiting.values_list("pk", "due_at")[:limit])
    if not found:
        return []
    lease_until = now + LEASE
    with transaction.atomic():
        begun = [
            pk
            for pk, due_at in found
            # Another poster can have begun it since it was read.
            if _held(pk, due_at).update(due_at=lease_until, attempts=F("attempts") + 1)
        ]
        posts = ReplyPost.objects.filter(pk__in=begun).select_related("heartbeat__session__agent")
        return [_attempt(post, lease_until) for post in posts.defer("heartbeat__prompt")]


def next_due() -> datetime | None:
    """Return when the next post is due, or counts as lost; None when none is on its way."""
    waiting = ReplyPost.objects.filter(state=ReplyState.PENDING)
    due_at: datetime | None = waiting.aggregate(next=Min("due_at"))["next"]
    return due_at


def end_attempt(attempt: Attempt, outcome: Delivered | Failed | Returned, *, now: datetime) -> bool:
    """Write down what came of an attempt; return whether it was still this process's to say.

    A failure is tried again, after a backoff or as much later as was asked for, unless it is
    permanent or was the last attempt. What was returned undone was no attempt and is due at once.
    """
    change: dict[str, Any]
    counted_as = "retried"
    if isinstance(outcome, Delivered):
        counted_as = "sent"
        change = {"state": ReplyState.SENT, "due_at": None, "settled_at": now, "error": ""}
    elif isinstance(outcome, Returned):
        change = {"due_at": now, "attempts": F("attempts") - 1}
    elif outcome.permanent or attempt.number >= MAX_ATTEMPTS:
        counted_as = "failed"
        change = {"state": ReplyState.FAILED, "due_at": None, "settled_at": now}
    else:
        asked_for = min(outcome.retry_after or timedelta(0), RETRY_AFTER_LIMIT)
        change = {"due_at": now + max(backoff(attempt.number), asked_for)}
    if isinstance(outcome, Failed):
        change["error"] = cut(outcome.error)[:MAX_ERROR_CHARACTERS]
    counts = metrics.Counts()
    if not isinstance(outcome, Returned):
        counts.reply_post(counted_as)
    with transaction.atomic():
        # The lease can have run out, and another poster have begun or ended the next attempt.
        if not _held(attempt.pk, attempt.lease_until).update(**change):
            return False
        counts.write()
    return True


def send_again(post_ids: Collection[int], *, now: datetime) -> int:
    """Send failed posts again, with all their attempts; return how many. For operators."""
    with transaction.atomic():
        failed = ReplyPost.objects.filter(pk__in=post_ids, state=ReplyState.FAILED)
        count = failed.update(state=ReplyState.PENDING, due_at=now, attempts=0, settled_at=None)
        doorbell.ring()
    return count


def _held(pk: int, due_at: datetime | None) -> QuerySet[ReplyPost]:
    """Return the post if it is on its way and due at exactly this time: nobody has moved it on."""
    return ReplyPost.objects.filter(pk=pk, state=ReplyState.PENDING, due_at=due_at)


def _attempt(post: ReplyPost, lease_until: datetime) -> Attempt:
    agent = post.heartbeat.session.agent
    return Attempt(
        pk=post.pk,
        number=post.attempts,
        lease_until=lease_until,
        agent_id=agent.pk,
        run_id=post.heartbeat.run_id,
        url=agent.reply_url,
        secret=agent.signing_secret,
        body=request_body(post.heartbeat),
    )


def request_body(run: Heartbeat) -> bytes:
    """Return a run's reply as it is posted: JSON in UTF-8."""
    ended = run.finished_at or run.started_at
    return msgspec.json.encode(
        {
            "runId": str(run.run_id),
            "agentId": run.session.agent_id,
            "sessionKey": run.session.key,
            "status": run.status,
            "reply": run.reply,
            "at": ended.astimezone(UTC).isoformat().replace("+00:00", "Z"),
            "events": [str(uid) for uid in run.events.order_by("pk").values_list("uid", flat=True)],
        }
    )


# --- The poster ---------------------------------------------------------------------------------


class ReplyPoster:
    """One worker. `run` serves until `stop` is called; then it gives its posts back and returns.

    `clock` gives the present time; tests pass their own.
    """

    def __init__(self, *, clock: Callable[[], datetime] = timezone.now) -> None:
        self._clock = clock
        self._stopping = asyncio.Event()
        self._give_up_at = math.inf
        self._look_again = asyncio.Event()
        self._posts: set[asyncio.Task[None]] = set()
        self._sending: set[asyncio.Task[Delivered | Failed]] = set()
        self._held_client: Client | None = None
        self._database = ThreadPoolExecutor(max_workers=1, thread_name_prefix="replies-database")

    def stop(self) -> None:
        """Ask it to end. Posts under way are broken off and given back.

        A database that does not take that within a few seconds is not waited for: they are tried
        again when their leases have run out.
        """
        self._give_up_at = time.monotonic() + STOP_SECONDS
        self._stopping.set()
        self._look_again.set()

    async def run(self) -> None:
        """Serve until stopped. Neither a failing database nor a defect ends it: it starts again."""
        try:
            while not self._stopping.is_set():
                try:
                    await self._serve()
                except DatabaseError as error:
                    logger.warning("replies: the database failed: %s; trying again", error)
                    await asyncio.sleep(DATABASE_RETRY_SECONDS)
                except Exception:
                    logger.exception("replies: serving failed; starting again")
                    await asyncio.sleep(DATABASE_RETRY_SECONDS)
        finally:
            for sending in self._sending:
                sending.cancel()
            await asyncio.gather(*self._posts, return_exceptions=True)
            await self.close()

    async def _serve(self) -> None:
        """Begin what is due, and wait for the doorbell or the next due time, until stopped."""
        look_again = self._look_again
        async with doorbell.listen(lambda _: look_again.set(), lambda: not look_again.is_set()):
            while not self._stopping.is_set():
                self._look_again.clear()
                pause = await self._begin_due()
                # It rings for every event: many rings are one look.
                snapshot = await self._in_database(configuration.gateway)
                posts = any(agent.reply_url for agent in snapshot.agents.values())
                apart = LOOK_SECONDS if posts else POLL_SECONDS
                await asyncio.sleep(min(pause, apart))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._look_again.wait(), max(pause - apart, 0.0))

    async def run_once(self) -> int:
        """Begin what is due, see it to its end, and return how many attempts there were."""
        await self._begin_due()
        begun = list(self._posts)
        await asyncio.gather(*begun)
        return len(begun)

    async def close(self) -> None:
        """Let go of the connections and of the database thread; no post is under way."""
        if self._held_client:
            await self._held_client.close()
        await self._in_database(connections.close_all)
        self._database.shutdown()

    async def _begin_due(self) -> float:
        """Begin what is due and fits; return the seconds until there may be more."""
        free = POSTS_AT_ONCE - len(self._posts)
        if free <= 0:
            return POLL_SECONDS  # or until one ends
        attempts, due_at = await self._in_database(self._look_step, free)
        for attempt in attempts:
            post = asyncio.create_task(self._post(attempt))
            self._posts.add(post)
            post.add_done_callback(self._ended)
        if due_at is None:
            return POLL_SECONDS
        return min(max((due_at - self._clock()).total_seconds(), 0.0), POLL_SECONDS)

    def _look_step(self, free: int) -> tuple[list[Attempt], datetime | None]:
        return begin_attempts(now=self._clock(), limit=free), next_due()

    def _ended(self, post: asyncio.Task[None]) -> None:
        self._posts.discard(post)
        self._look_again.set()
        if not post.cancelled() and (error := post.exception()):
            logger.error("replies: a post ended in a defect", exc_info=error)

    async def _post(self, attempt: Attempt) -> None:
        """See one attempt to its end: send the reply, and write down what came of it."""
        sending = asyncio.create_task(self._send(attempt))
        self._sending.add(sending)
        await asyncio.wait([sending])
        self._sending.discard(sending)
        outcome = Returned() if sending.cancelled() else sending.result()
        word = {Delivered: "taken", Failed: "failed", Returned: "given back"}[type(outcome)]
        run_id, ids = attempt.run_id, _ids(attempt)
        logger.info("replies: run %s, attempt %d: %s", run_id, attempt.number, word, extra=ids)
        if isinstance(outcome, Failed):  # its text may quote what the receiver answered
            logger.debug("replies: run %s: %s", run_id, outcome.error, extra=ids)
        while True:
            try:
                ended = await self._in_database(end_attempt, attempt, outcome, now=self._clock())
            except DatabaseError as error:
                is_late = self._clock() >= attempt.lease_until
                if not is_late and time.monotonic() < self._give_up_at:
                    await asyncio.sleep(DATABASE_RETRY_SECONDS)
                    continue
                left = "replies: run %s is left to its lease: %s"
                logger.warning(left, run_id, error, extra=ids)
            else:
                if not ended:
                    refused = "replies: run %s lost its lease; its outcome was refused"
                    logger.warning(refused, run_id, extra=ids)
            return

    async def _send(self, attempt: Attempt) -> Delivered | Failed:
        """Return what came of posting the reply. A defect or a time-out is a failed attempt."""
        if not attempt.url:
            return Failed("the agent has no reply URL any more", permanent=True)
        # Imported at the first reply: a process that posts none starts without the library.
        from wake.heartbeats.runners.http import post_signed
        from wake.heartbeats.runners.http_client import Client

        if self._held_client is None:
            self._held_client = Client()
        try:
            async with asyncio.timeout(TIME_LIMIT_SECONDS):
                return await post_signed(
                    self._held_client,
                    attempt.url,
                    attempt.secret,
                    attempt.agent_id,
                    attempt.run_id,
                    attempt.body,
                )
        except TimeoutError:
            return Failed(f"no answer within {TIME_LIMIT_SECONDS:g} s")
        except Exception as error:
            defect = "replies: run %s: defect in posting its reply"
            logger.exception(defect, attempt.run_id, extra=_ids(attempt))
            return Failed(f"it could not be posted: {type(error).__name__}")

    async def _in_database(self, step: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `step` on the poster's database thread."""
        return await call_in(self._database, step, *args, **kwargs)


def _ids(attempt: Attempt) -> dict[str, str]:
    """Return what a log line about an attempt carries beside its text."""
    return {"run_id": str(attempt.run_id), "agent_id": attempt.agent_id}
