"""What a heartbeat process does: the heartbeat loop, and beside it the posting of replies."""

from __future__ import annotations

import asyncio

from wake.heartbeats.loop import HeartbeatLoop
from wake.heartbeats.replies import ReplyPoster


class Worker:
    """Both of them. `run` serves until `stop` is called."""

    def __init__(self) -> None:
        self._parts = (HeartbeatLoop(), ReplyPoster())

    def stop(self) -> None:
        """Ask both to give their work back and to end."""
        for part in self._parts:
            part.stop()

    async def run(self) -> None:
        """Serve until stopped."""
        async with asyncio.TaskGroup() as parts:
            for part in self._parts:
                parts.create_task(part.run())
