"""Keeping the threads of a server process on one core.

Python lets one of them run at a time, and they work on the same objects: from core to core these
take longer to travel than most of what is done with them. (A wake stored by another thread on
another core took a quarter longer.) Which core it is the system chooses anew every second, so that
the process leaves one that others want, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import Final

TOGETHER_SECONDS: Final = 1.0
# The system moves a thread when it wakes or when its core is contended, within milliseconds.
FREE_SECONDS: Final = 0.02
_THREADS: Final = Path("/proc/self/task")
# In what the system says of a thread, counted after its name.
_PLACE_OF_CORE: Final = 36

# The cores that this process may have, while it keeps to one.
_all: frozenset[int] = frozenset()


def are_there_more_than(count: int) -> bool:
    """Whether this process may choose among more cores. It may not but on Linux."""
    return _THREADS.exists() and len(os.sched_getaffinity(0)) > count


async def keep_to_one() -> None:
    """Keep this process to one core until cancelled."""
    global _all
    _all = frozenset(os.sched_getaffinity(0))
    try:
        while True:
            await asyncio.sleep(FREE_SECONDS)
            _move({_present_core()})
            await asyncio.sleep(TOGETHER_SECONDS)
            _move(_all)
    finally:
        _move(_all)
        _all = frozenset()


def leave() -> None:
    """Let this thread, and what it starts from now on, run on any core until the next second."""
    if _all:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, _all)


def _move(cores: Collection[int]) -> None:
    for thread in _THREADS.iterdir():
        with contextlib.suppress(OSError):  # it has ended, or may not be moved
            os.sched_setaffinity(int(thread.name), cores)


def _present_core() -> int:
    said = Path("/proc/thread-self/stat").read_text()
    return int(said.rpartition(")")[2].split()[_PLACE_OF_CORE])
