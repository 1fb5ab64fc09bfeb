"""What runs beside the server in its process, started and stopped with it (ASGI lifespan).

That is the thread that keeps the configuration fresh, the one that tidies up, and what runs
heartbeats; without heartbeats, a loop for those agents alone whose clients are connected to this
process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Final

from asgiref.typing import ASGIReceiveCallable, ASGISendCallable, Scope
from django.conf import settings
from django.db import DatabaseError

from wake import configuration, cores, metrics, upkeep
from wake.heartbeats import pulse
from wake.heartbeats.loop import HeartbeatLoop
from wake.heartbeats.worker import Worker
from wake.limits import settle_memory
from wake.models import RunnerKind

# Set to 0 by `manage.py gateway --no-heartbeats`, for every worker process it starts.
HEARTBEATS_VARIABLE: Final = "OPENCLAW_HEARTBEATS"


def _write_noted() -> None:
    with contextlib.suppress(DatabaseError):
        metrics.write_noted()


class Lifespan:
    """An ASGI application for the scope `lifespan`.

    `besides` are what other parts of the site have running, as long as the server does.
    """

    def __init__(self, *besides: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
        self._besides = besides

    async def __call__(
        self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> None:
        heartbeats: Worker | HeartbeatLoop | None = None
        serving: asyncio.Task[None] | None = None
        beside = contextlib.ExitStack()
        keeping: asyncio.Task[None] | None = None
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await asyncio.to_thread(beside.enter_context, configuration.keep_fresh())
                beside.callback(_write_noted)
                beside.enter_context(upkeep.keep_up())
                for another in self._besides:
                    beside.enter_context(another())
                # Clients of the inbox runner are connected here, and reached from nowhere else.
                is_all = os.environ.get(HEARTBEATS_VARIABLE, "1") != "0"
                heartbeats = Worker() if is_all else HeartbeatLoop(kinds={RunnerKind.INBOX})
                pulse.expect(True)
                serving = asyncio.create_task(heartbeats.run())
                if settings.OPENCLAW_ONE_CORE and cores.are_there_more_than(1):
                    keeping = asyncio.create_task(cores.keep_to_one())
                settle_memory()
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                if keeping:
                    keeping.cancel()
                try:
                    if heartbeats and serving:
                        heartbeats.stop()
                        await serving
                        pulse.expect(False)
                finally:  # what others wait for is stored, however the heartbeats ended
                    await asyncio.to_thread(beside.close)
                await send({"type": "lifespan.shutdown.complete"})
                return
