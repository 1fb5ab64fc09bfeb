"""Ending a command that serves: at the first signal in good order, at the second one at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Final

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def stop_on_signals(stop: Callable[[], None]) -> None:
    """Have the first SIGINT or SIGTERM call `stop`, and the second one cancel the present task."""
    loop = asyncio.get_running_loop()
    serving = asyncio.current_task()
    assert serving is not None  # noqa: S101 - it is called by a coroutine

    def stop_at_once() -> None:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
        serving.cancel()

    def stop_first() -> None:
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, stop_at_once)
        stop()

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop_first)
