"""A gateway keeps to one core where there are more than it has workers; what it starts does not."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from tests.live import LiveGateway
from tests.wake.turns import command_turn
from wake import cores
from wake.heartbeats.runners import Delivered
from wake.heartbeats.runners.command import CommandRunner
from wake.management.commands.gateway import _keep_to_one_core

SECONDS = 10

pytestmark = pytest.mark.skipif(
    not cores.are_there_more_than(1), reason="needs Linux and two cores"
)


def cores_of_threads(pid: int) -> set[frozenset[int]]:
    """Return on which cores the threads of a process may run."""
    found = set()
    for thread in Path(f"/proc/{pid}/task").iterdir():
        try:
            found.add(frozenset(os.sched_getaffinity(int(thread.name))))
        except ProcessLookupError:  # it has ended
            continue
    return found


def keeps_to_one(pid: int) -> bool:
    found = cores_of_threads(pid)
    return len(found) == 1 and len(*found) == 1


def test_with_a_worker_for_each_core_it_is_left_to_the_system(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there_are = len(os.sched_getaffinity(0))
    for workers, keeps in ((there_are - 1, True), (there_are, False)):
        monkeypatch.setenv("OPENCLAW_ONE_CORE", "")  # put back at the end
        settings.OPENCLAW_ONE_CORE = None
        _keep_to_one_core(workers)
        assert settings.OPENCLAW_ONE_CORE is keeps


def test_all_threads_of_a_gateway_keep_to_one_core(tmp_path: Path) -> None:
    with LiveGateway(tmp_path) as gateway:
        assert gateway.process
        deadline = time.monotonic() + SECONDS
        while not keeps_to_one(gateway.process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_it_can_be_left_to_the_system(tmp_path: Path) -> None:
    with LiveGateway(tmp_path, environment={"OPENCLAW_ONE_CORE": "0"}) as gateway:
        assert gateway.process
        time.sleep(10 * cores.FREE_SECONDS)
        whole = frozenset(os.sched_getaffinity(0))
        assert cores_of_threads(gateway.process.pid) == {whole}


async def keeps(whole: Collection[int]) -> None:
    """Wait until this thread keeps to one core."""
    deadline = time.monotonic() + SECONDS
    while os.sched_getaffinity(0) == whole:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    assert len(os.sched_getaffinity(0)) == 1


async def test_an_agents_program_may_run_on_any_core_and_so_may_all_in_the_end() -> None:
    whole = os.sched_getaffinity(0)
    keeping = asyncio.create_task(cores.keep_to_one())
    await keeps(whole)
    program = "import os; print(sorted(os.sched_getaffinity(0)))"
    outcome = await CommandRunner().run(command_turn(sys.executable, "-c", program))
    assert outcome == Delivered(f"{sorted(whole)}\n")
    await keeps(whole)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    assert cores_of_threads(os.getpid()) == {frozenset(whole)}
