"""The batching writer: many that wait for a commit share one.

A commit that survives a power cut takes as long for one row as for a hundred. So a thread takes
what has gathered while the last commit was under way, stores it in one transaction and wakes those
who wait. Nobody waits for others to come: when it is idle, one is stored at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Final, Generic, TypeVar

from django.db import connections

from wake.errors import StorageUnavailable, WakeError
from wake.threads import on_kept_connection

MOST_AT_ONCE: Final = 128
MOST_WAITING: Final = 2048
JOIN_SECONDS: Final = 10.0

logger = logging.getLogger(__name__)

Job = TypeVar("Job")
Result = TypeVar("Result")
_Waiting = tuple[Job, "asyncio.Future[Result]"]


class BatchingWriter(Generic[Job, Result]):
    """Stores jobs by `write`, which gets several and returns as many results, in their order.

    A result may be a WakeError: that job's alone. What `write` raises is every job's of that batch,
    and no other's. Jobs are stored in the order in which they were put in. `put` is called on one
    event loop.
    """

    def __init__(
        self,
        write: Callable[[Sequence[Job]], Sequence[Result | WakeError]],
        *,
        most_at_once: int = MOST_AT_ONCE,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        self._write = write
        self._most_at_once = most_at_once
        self._most_waiting = most_waiting
        self._jobs: SimpleQueue[_Waiting[Job, Result] | None] = SimpleQueue()
        self._waiting = 0
        self._is_running = False

    @property
    def is_running(self) -> bool:
        """Whether there is a thread that stores what is put in."""
        return self._is_running

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Store what is put in, on a thread of its own, while this lasts; at its end, the rest."""
        thread = threading.Thread(target=self._serve, name="writer", daemon=True)
        thread.start()
        self._is_running = True
        try:
            yield
        finally:
            self._is_running = False
            self._jobs.put(None)
            thread.join(JOIN_SECONDS)

    async def put(self, job: Job) -> Result:
        """Return the job's result once it is committed.

        Raises the WakeError that is its result, StorageUnavailable when too many wait already, and
        what `write` raised.
        """
        if self._waiting >= self._most_waiting:
            raise StorageUnavailable("too much is waiting to be stored; try again")
        done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting += 1
        self._jobs.put((job, done))
        try:
            return await done
        finally:
            self._waiting -= 1

    def _serve(self) -> None:
        while (batch := self._gathered()) is not None:
            self._store(batch)
        connections.close_all()

    def _gathered(self) -> list[_Waiting[Job, Result]] | None:
        """Wait for a job and return it with those that came meanwhile; None at the end."""
        first = self._jobs.get()
        if first is None:
            return None
        batch = [first]
        with contextlib.suppress(Empty):
            while len(batch) < self._most_at_once:
                job = self._jobs.get_nowait()
                if job is None:
                    self._jobs.put(None)
                    break
                batch.append(job)
        return batch

    def _store(self, batch: list[_Waiting[Job, Result]]) -> None:
        results: Sequence[Result | Exception]
        try:
            results = on_kept_connection(self._write, [job for job, _ in batch])
        except Exception as error:
            if not isinstance(error, WakeError):
                logger.exception("writer: a batch of %d failed", len(batch))
            results = [error] * len(batch)
        waiting = [done for _, done in batch]
        with contextlib.suppress(RuntimeError):  # the loop is gone, and who waited with it
            waiting[0].get_loop().call_soon_threadsafe(_tell, waiting, results)


def _tell(waiting: Sequence[asyncio.Future[Result]], results: Sequence[Result | Exception]) -> None:
    for done, result in zip(waiting, results, strict=True):
        if done.done():  # whoever waited has left; it is stored all the same
            continue
        if isinstance(result, Exception):
            done.set_exception(result)
        else:
            done.set_result(result)
