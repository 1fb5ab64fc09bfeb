"""Calling what uses the database from an event loop, on threads that keep their connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import ParamSpec, TypeVar

from django.db import connections

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
    for connection in connections.all(initialized_only=True):
        connection.close_at = None
        connection.close_if_unusable_or_obsolete()
    return function(*args, **kwargs)
