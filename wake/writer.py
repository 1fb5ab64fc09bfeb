"""The batching writer: many that wait for a commit share one.

A commit that survives a power cut takes as long for one row as for a hundred. So a thread takes
what has gathered while the last commit was under way, stores it in one transaction and wakes those
who wait.

The event loop hands jobs over when it has nothing else to do, and then gives way for a moment: it
and the thread can only run in turns (Python's lock), and to take turns within a batch costs both
more than to wait for the other's end. Nobody waits for others to come: when all is idle, a job is
stored at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Final, Generic, TypeVar

from django.db import connections

from wake.errors import StorageUnavailable, WakeError
from wake.threads import on_kept_connection

MOST_AT_ONCE: Final = 128
MOST_WAITING: Final = 2048
# While the thread writes: longer than most batches take, too short to be missed elsewhere.
GIVE_WAY_SECONDS: Final = 0.005
# Who was answered together comes back together: so many turns of the event loop, some hundredths of
# a millisecond in all, may pass without another job before they are handed over.
MOST_QUIET_TURNS: Final = 8
JOIN_SECONDS: Final = 10.0

logger = logging.getLogger(__name__)

Job = TypeVar("Job")
Result = TypeVar("Result")


class _Batch(Generic[Job, Result]):
    """Jobs that are stored together, who is told of each, and the lock of who gives way until then.

    They are told once.
    """

    def __init__(self, gathered: Sequence[tuple[Job, Callable[[Result | WakeError], None]]]):
        self.jobs = [job for job, _ in gathered]
        self.told = [told for _, told in gathered]
        self.written: threading.Lock | None = None
        self.is_told = False


class BatchingWriter(Generic[Job, Result]):
    """Stores jobs by `write`, which gets several and returns as many results, in their order.

    A result may be a WakeError: that job's alone. When `write` raises, whatever it is, no job of
    that batch is stored, and all others are. Jobs are stored in the order in which they were put
    in. `put` is called on one event loop, and there the results are told.
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
        self._batches: SimpleQueue[_Batch[Job, Result] | None] = SimpleQueue()
        # What is not handed over yet, and what the thread has been given.
        self._gathered: list[tuple[Job, Callable[[Result | WakeError], None]]] = []
        self._under_way: list[_Batch[Job, Result]] = []
        self._taken = 0  # how many jobs those are
        self._answered_last = 0  # how many were told together, last
        self._expected = 0  # how many there are when all those have come back
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_running = False
        # Nothing is put in after the end was: nobody would ever take it.
        self._lock = threading.Lock()

    @property
    def is_running(self) -> bool:
        """Whether there is a thread that stores what is put in."""
        return self._is_running

    @property
    def waiting(self) -> int:
        """How many jobs are not stored yet."""
        return len(self._gathered) + self._taken

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Store what is put in, on a thread of its own, while this lasts; at its end, the rest.

        What is not stored 10 s after the end is given up: who waits is told so.
        """
        batches = self._batches = SimpleQueue()
        self._gathered, self._under_way = [], []
        self._taken = self._answered_last = self._expected = 0
        thread = threading.Thread(target=self._serve, args=(batches,), name="writer", daemon=True)
        thread.start()
        self._is_running = True
        try:
            yield
        finally:
            with self._lock:
                self._is_running = False
                while self._gathered:
                    batches.put(self._take())
                batches.put(None)
            thread.join(JOIN_SECONDS)
            if thread.is_alive():
                self._give_up(batches)

    def put(self, job: Job, told: Callable[[Result | WakeError], None]) -> None:
        """Have a job stored, and be told its result once it is committed.

        That may be a WakeError; StorageUnavailable when its batch failed. Raises StorageUnavailable
        when too many wait already, or the writer has stopped.
        """
        with self._lock:
            if not self._is_running:
                raise StorageUnavailable("the gateway is stopping; try again")
            if self.waiting >= self._most_waiting:
                raise StorageUnavailable("too much is waiting to be stored; try again")
            self._gathered.append((job, told))
            is_first = len(self._gathered) == 1
        if is_first and not self._under_way:
            self._loop = asyncio.get_running_loop()
            self._loop.call_soon(self._hand_over, 0, 0)

    def _hand_over(self, known: int, quiet_turns: int) -> None:
        """Hand over what has gathered, once nothing more comes; `known` came a turn ago or before.

        Then give way to the thread: it may be done soon.
        """
        count = len(self._gathered)
        quiet_turns = 0 if count > known else quiet_turns + 1
        if quiet_turns < min(self._answered_last // 2, MOST_QUIET_TURNS) and count < min(
            self._expected, self._most_at_once
        ):
            os.sched_yield()  # who is about to send may need this core for it
            asyncio.get_running_loop().call_soon(self._hand_over, count, quiet_turns)
            return
        written = threading.Lock()
        written.acquire()
        with self._lock:
            if not self._gathered:  # the end came first, and handed them over
                return
            batch = self._take()
            batch.written = written
            self._batches.put(batch)
        written.acquire(timeout=GIVE_WAY_SECONDS)

    def _take(self) -> _Batch[Job, Result]:
        """Return what has gathered first, as many as are stored at once; the rest stays."""
        taken = self._gathered[: self._most_at_once]
        del self._gathered[: self._most_at_once]
        batch: _Batch[Job, Result] = _Batch(taken)
        self._under_way.append(batch)
        self._taken += len(taken)
        return batch

    def _serve(self, batches: SimpleQueue[_Batch[Job, Result] | None]) -> None:
        while (batch := batches.get()) is not None:
            self._tell_on_loop(batch, self._stored(batch.jobs))
            if batch.written:
                batch.written.release()
        connections.close_all()

    def _stored(self, jobs: Sequence[Job]) -> Sequence[Result | WakeError]:
        try:
            results = on_kept_connection(self._write, jobs)
            if len(results) != len(jobs):
                raise RuntimeError(f"{len(results)} results for {len(jobs)} jobs")
            return results
        except BaseException as error:  # whatever it is, the thread lives on: others wait for it
            if not isinstance(error, WakeError):
                logger.exception("writer: a batch of %d failed", len(jobs))
            return [_unavailable() for _ in jobs]

    def _give_up(self, batches: SimpleQueue[_Batch[Job, Result] | None]) -> None:
        """Tell all who wait that their jobs are not stored; the batch under way may be, yet."""
        logger.error("writer: the database did not take everything in time")
        with contextlib.suppress(Empty):
            while True:
                batches.get_nowait()
        batches.put(None)
        for batch in list(self._under_way):
            self._tell_on_loop(batch, [_unavailable() for _ in batch.jobs])

    def _tell_on_loop(
        self, batch: _Batch[Job, Result], results: Sequence[Result | WakeError]
    ) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is gone, and who waited with it
                self._loop.call_soon_threadsafe(self._tell, batch, results)

    def _tell(self, batch: _Batch[Job, Result], results: Sequence[Result | WakeError]) -> None:
        if batch.is_told:
            return
        batch.is_told = True
        if batch in self._under_way:  # else it is of an earlier time that this ran
            self._under_way.remove(batch)
            self._taken -= len(batch.jobs)
        self._answered_last = len(batch.told)
        self._expected = len(self._gathered) + len(batch.told)
        if self._gathered:
            asyncio.get_running_loop().call_soon(self._hand_over, 0, 0)
        for told, result in zip(batch.told, results, strict=True):
            try:
                told(result)
            except Exception:  # the others wait, too
                logger.exception("writer: the result of a job could not be told")


def _unavailable() -> StorageUnavailable:
    # Each has its own: a traceback grows with every time that its error is raised.
    return StorageUnavailable("the event could not be stored now; try again")
