"""An agent that answers and remembers when each event came: for the http runner.

    python -m bench.agent

POST takes a heartbeat, at once or in as many milliseconds as the query says. GET answers with the
arrivals so far, `{EVENT ID: SECONDS}`, in the time of time.monotonic(), which all processes of a
machine share.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from bench.serving import serve

_arrivals: dict[str, float] = {}


class _Event(msgspec.Struct):
    id: str


class _Heartbeat(msgspec.Struct):
    events: list[_Event]


async def application(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """Take a heartbeat, or tell of those that came."""
    arrived = time.monotonic()
    body, more = b"", True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":  # the gateway was stopped in the middle of it
            return
        body += event.get("body", b"")
        more = event.get("more_body", False)
    if scope["method"] == "POST":
        for taken in msgspec.json.decode(body, type=_Heartbeat).events:
            _arrivals.setdefault(taken.id, arrived)
        answer = b'{"reply":"HEARTBEAT_OK"}'
        if query := scope["query_string"]:
            await asyncio.sleep(int(query) / 1000)
    else:
        answer = msgspec.json.encode(_arrivals)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(answer)).encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


if __name__ == "__main__":
    serve(application)
