"""What a server process does beside its work, every so often.

Parts of the site register what is to be done; a thread of the server does it (`keep_up`). Several
processes may do the same at the same time.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from django.db import DatabaseError, connections

# The first time comes after this share of the interval: sooner, so that a process that never lives
# for a whole one does it too, and not at once, so that it does not slow the start down.
FIRST_SHARE: Final = 0.1
JOIN_SECONDS: Final = 2.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Chore:
    """What is to be done: `do` is called every so often and ends early when its event is set."""

    every: timedelta
    do: Callable[[threading.Event], object]


_chores: dict[str, Chore] = {}


def register(name: str, every: timedelta, do: Callable[[threading.Event], object]) -> None:
    """Have `do` done every so often in every server process. A name registered again is replaced.

    `do` may use the database, and may raise: it is called again when it is due again.
    """
    _chores[name] = Chore(every, do)


@contextlib.contextmanager
def keep_up() -> Iterator[None]:
    """Do what is registered, on a thread of its own, while this lasts."""
    stopped = threading.Event()
    thread = threading.Thread(target=_serve, args=(stopped,), name="upkeep", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(JOIN_SECONDS)


def _serve(stopped: threading.Event) -> None:
    began = time.monotonic()
    due = {
        name: began + chore.every.total_seconds() * FIRST_SHARE for name, chore in _chores.items()
    }
    while due:
        name = min(due, key=lambda name: due[name])
        if stopped.wait(max(0.0, due[name] - time.monotonic())):
            return
        _do(name, _chores[name], stopped)
        due[name] = time.monotonic() + _chores[name].every.total_seconds()


def _do(name: str, chore: Chore, stopped: threading.Event) -> None:
    try:
        chore.do(stopped)
    except DatabaseError as error:
        logger.warning("upkeep: %s was not finished: %s", name, error)
    except Exception:
        logger.exception("upkeep: %s failed", name)
    finally:
        connections.close_all()
