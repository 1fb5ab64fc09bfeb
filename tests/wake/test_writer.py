"""The batching writer: what waits for a commit shares one, in order, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import pytest
from asgiref.sync import sync_to_async
from django.db import connection
from django.test.utils import CaptureQueriesContext

from wake import writer as writer_module
from wake.dispatch import Receipt, WakeRequest, dispatch_batch
from wake.errors import Refused, StorageUnavailable, WakeError
from wake.models import SystemEvent
from wake.writer import BatchingWriter

T = TypeVar("T")


class Desk:
    """Takes numbers, and doubles them, a batch at a time; holds while `is_open` is not set."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.is_open = threading.Event()
        self.is_open.set()
        self.fail: Callable[[list[int]], None] = lambda jobs: None

    def write(self, jobs: Sequence[int]) -> list[int | WakeError]:
        self.batches.append(list(jobs))
        assert self.is_open.wait(10)
        self.fail(list(jobs))
        return [Refused(f"not {job}") if job < 0 else job * 2 for job in jobs]

    @property
    def taken(self) -> list[int]:
        return [job for batch in self.batches for job in batch]


@pytest.fixture
def desk() -> Desk:
    return Desk()


@contextlib.asynccontextmanager
async def running(writer: BatchingWriter[int, int]) -> AsyncIterator[None]:
    """Run the writer; its end does not stop the event loop, as at a server's."""
    context = writer.running()
    context.__enter__()
    try:
        yield
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - another thread makes it true
        await asyncio.sleep(0.001)


async def put(writer: BatchingWriter[Any, T], job: Any) -> T:
    """Put a job in and return its result; raise it where it is an error."""
    told: asyncio.Future[T | WakeError] = asyncio.get_running_loop().create_future()
    writer.put(job, lambda result: None if told.done() else told.set_result(result))
    result = await told
    if isinstance(result, WakeError):
        raise result
    return result


async def held(desk: Desk, writer: BatchingWriter[int, int], *jobs: int) -> list[asyncio.Task[int]]:
    """Put jobs in while the desk holds the first one, and return who waits for them."""
    desk.is_open.clear()
    waiting = [asyncio.create_task(put(writer, 0))]
    await until(lambda: desk.batches)
    waiting += [asyncio.create_task(put(writer, job)) for job in jobs]
    await asyncio.sleep(0.01)
    return waiting


async def test_what_came_meanwhile_is_written_together_and_in_order(desk: Desk) -> None:
    writer = BatchingWriter(desk.write, most_at_once=4)
    async with running(writer), asyncio.timeout(10):
        waiting = await held(desk, writer, *range(1, 7))
        desk.is_open.set()
        assert await asyncio.gather(*waiting) == [0, 2, 4, 6, 8, 10, 12]
    assert desk.batches == [[0], [1, 2, 3, 4], [5, 6]]


async def test_an_idle_writer_waits_for_nobody(desk: Desk) -> None:
    writer = BatchingWriter(desk.write)
    async with running(writer), asyncio.timeout(10):
        began = time.monotonic()
        for job in range(100):
            assert await put(writer, job) == job * 2
        assert time.monotonic() - began < 0.5
    assert desk.batches == [[job] for job in range(100)]


async def test_a_job_that_is_refused_is_refused_alone(desk: Desk) -> None:
    writer = BatchingWriter(desk.write)
    async with running(writer), asyncio.timeout(10):
        waiting = await held(desk, writer, 1, -2, 3)
        desk.is_open.set()
        results = await asyncio.gather(*waiting, return_exceptions=True)
    assert desk.batches[1:] == [[1, -2, 3]]
    assert [str(result) for result in results] == ["0", "2", "not -2", "6"]
    assert isinstance(results[2], Refused)


@pytest.mark.parametrize(
    "error", [RuntimeError("a defect"), StopIteration(), SystemExit(1)], ids=repr
)
async def test_a_batch_that_fails_fails_alone(desk: Desk, error: BaseException) -> None:
    def fail(jobs: list[int]) -> None:
        if 2 in jobs:
            raise error

    desk.fail = fail
    writer = BatchingWriter(desk.write)
    async with running(writer), asyncio.timeout(10):
        waiting = await held(desk, writer, 1, 2, 3)
        desk.is_open.set()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert results[0] == 0
        assert all(isinstance(result, StorageUnavailable) for result in results[1:])
        assert len(set(map(id, results[1:]))) == 3, "each has its own: it is raised three times"
        assert await put(writer, 4) == 8


async def test_too_few_results_leave_nobody_waiting(desk: Desk) -> None:
    writer = BatchingWriter[int, int](lambda jobs: desk.write(jobs)[:1])
    async with running(writer), asyncio.timeout(10):
        waiting = await held(desk, writer, 1, 2)
        desk.is_open.set()
        results = await asyncio.gather(*waiting, return_exceptions=True)
    assert results[0] == 0
    assert [type(result) for result in results[1:]] == [StorageUnavailable] * 2


async def test_who_fails_when_told_keeps_nobody_else_from_it(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(result: int | WakeError) -> None:
        raise RuntimeError("a defect")

    writer = BatchingWriter(desk.write)
    async with running(writer), asyncio.timeout(10):
        writer.put(1, fail)
        assert await put(writer, 2) == 4
    assert desk.batches == [[1, 2]]
    assert "a defect" in caplog.text


async def test_over_the_limit_nothing_is_taken(desk: Desk) -> None:
    writer = BatchingWriter(desk.write, most_waiting=3)
    async with running(writer), asyncio.timeout(10):
        waiting = await held(desk, writer, 1, 2)
        with pytest.raises(StorageUnavailable, match="too much is waiting"):
            await put(writer, 3)
        desk.is_open.set()
        assert await asyncio.gather(*waiting) == [0, 2, 4]
        assert await put(writer, 4) == 8
    assert 3 not in desk.taken


async def test_who_leaves_is_written_all_the_same_and_counts_until_then(desk: Desk) -> None:
    writer = BatchingWriter(desk.write, most_waiting=3)
    async with running(writer), asyncio.timeout(10):
        waiting = await held(desk, writer, 1, 2)
        waiting[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[1]
        with pytest.raises(StorageUnavailable):
            await put(writer, 3)
        desk.is_open.set()
        assert await asyncio.gather(*waiting[::2]) == [0, 4]
    assert desk.taken == [0, 1, 2]


async def test_a_stop_writes_the_rest(desk: Desk) -> None:
    writer = BatchingWriter(desk.write, most_at_once=2)
    async with asyncio.timeout(10):
        async with running(writer):
            waiting = await held(desk, writer, *range(1, 6))
            asyncio.get_running_loop().call_later(0.05, desk.is_open.set)
        assert await asyncio.gather(*waiting) == [0, 2, 4, 6, 8, 10]
    assert not writer.is_running


async def test_after_the_stop_nothing_is_taken(desk: Desk) -> None:
    writer = BatchingWriter(desk.write)
    async with running(writer):
        pass
    async with asyncio.timeout(1):
        with pytest.raises(StorageUnavailable, match="stopping"):
            await put(writer, 1)
    async with running(writer), asyncio.timeout(10):
        assert await put(writer, 2) == 4


async def test_a_stop_that_takes_too_long_leaves_nobody_waiting(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "JOIN_SECONDS", 0.1)
    writer = BatchingWriter(desk.write, most_at_once=2)
    async with asyncio.timeout(5):
        async with running(writer):
            waiting = await held(desk, writer, 1, 2)
        results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [StorageUnavailable] * 3
    desk.is_open.set()
    async with running(writer), asyncio.timeout(10):
        assert await put(writer, 4) == 8
    assert desk.taken == [0, 4], "what was given up is not written later"


@pytest.mark.django_db(transaction=True)
async def test_wakes_that_wait_share_a_transaction() -> None:
    is_open = threading.Event()
    written: list[list[str]] = []
    began: list[int] = []

    def write(requests: Sequence[WakeRequest]) -> list[Receipt | WakeError]:
        written.append([request.text for request in requests])
        assert is_open.wait(10)
        with CaptureQueriesContext(connection) as queries:
            results = dispatch_batch(requests)
        began.append(sum(query["sql"] == "BEGIN IMMEDIATE" for query in queries))
        return results

    writer = BatchingWriter[WakeRequest, Receipt](write)
    context = writer.running()
    context.__enter__()
    texts = ["first", "a", " ", "b", "a", "c"]
    async with asyncio.timeout(10):
        waiting = []
        for text in texts:
            waiting.append(asyncio.create_task(put(writer, WakeRequest(text, "cli"))))
            await until(lambda: written)
        await asyncio.sleep(0.01)
        is_open.set()
        results = await asyncio.gather(*waiting, return_exceptions=True)
    await asyncio.to_thread(context.__exit__, None, None, None)
    assert written == [["first"], texts[1:]]
    assert began in ([1, 1], [0, 0])  # psycopg begins without a statement
    assert isinstance(results[2], Refused)
    acknowledged = [str(result.event_id) for result in results if isinstance(result, Receipt)]
    stored = await sync_to_async(
        lambda: list(SystemEvent.objects.order_by("pk").values_list("uid", "text"))
    )()
    assert [text for _, text in stored] == ["first", "a", "b", "a", "c"]
    assert [str(uid) for uid, _ in stored] == acknowledged


async def test_who_was_answered_together_is_written_together_again(desk: Desk) -> None:
    writer = BatchingWriter(desk.write)

    async def client(number: int) -> None:
        for _ in range(20):
            assert await put(writer, number) == number * 2
            for _ in range(number):  # its next one comes a turn later than its neighbour's
                await asyncio.sleep(0)

    async with running(writer), asyncio.timeout(10):
        await asyncio.gather(*map(client, range(8)))
    assert len(desk.taken) == 8 * 20
    assert len(desk.batches) < 1.1 * 20


async def test_the_event_loop_gives_way_for_a_moment_only(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "GIVE_WAY_SECONDS", 0.2)
    writer = BatchingWriter(desk.write)
    async with running(writer), asyncio.timeout(10):
        desk.is_open.clear()
        began = time.monotonic()
        waiting = [asyncio.create_task(put(writer, job)) for job in range(3)]
        await until(lambda: desk.batches)
        assert 0.2 <= time.monotonic() - began < 1, "it waited for the writer, and then went on"
        began = time.monotonic()
        waiting += [asyncio.create_task(put(writer, job)) for job in range(3, 6)]
        await asyncio.sleep(0.01)
        assert time.monotonic() - began < 0.1, "it waits for no batch behind another"
        desk.is_open.set()
        assert await asyncio.gather(*waiting) == [0, 2, 4, 6, 8, 10]
    assert desk.batches == [[0, 1, 2], [3, 4, 5]]
