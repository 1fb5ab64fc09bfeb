"""Calling what uses the database from an event loop, on threads that keep their connections."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Final, ParamSpec, TypeVar

from django.db import connections

HEALTH_CHECK_SECONDS: Final = 1.0

# When this thread last asked whether its connections are usable.
_thread = threading.local()

P = ParamSpec("P")
T = TypeVar("T")


async def call_in(
    executor: Executor, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
) -> T:
    """Call a function that uses the database on a thread of `executor`, and return its result."""
    call = partial(on_kept_connection, function, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(executor, call)


def on_kept_connection(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function on this thread's connection, which stays open until the database fails.

    Django closes connections by age, at the end of a request. These threads serve no request:
    theirs are closed only when an error has left them unusable, before the next use.
    """
    now = time.monotonic()
    is_checked = now - getattr(_thread, "checked_at", -HEALTH_CHECK_SECONDS) < HEALTH_CHECK_SECONDS
    for connection in connections.all(initialized_only=True):
        connection.close_at = None
        was_checked = getattr(connection, "health_check_done", False)
        connection.close_if_unusable_or_obsolete()
        # Django asks a server before each use whether it is there. A thread that has just used it
        # will hear soon enough when it is not.
        if was_checked and is_checked:
            connection.health_check_done = True  # type: ignore[attr-defined]
    if not is_checked:
        _thread.checked_at = now
    return function(*args, **kwargs)
