"""Many connections to one gateway process: what each costs, and whether all are told everything.

    python -m bench connections [--connections 1000] [--no-deflate]

1. Connects clients of the gateway protocol side by side; each follows one session.
2. Sends one event to that session and waits until every client was told of it.
3. One more client follows a session of its own and stops reading, while that session gets more
   text than the gateway buffers for a client. The others must be told of another event meanwhile,
   and the one that did not read must find its connection closed with 1008.

Runs on SQLite, or on the PostgreSQL server that DATABASE_URL names (in a database of its own).
Times are of this machine, which runs the clients too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from bench import gateways, machine
from bench.report import Report
from tests.live import LiveGateway

HELP = "many connections: memory and time of each, and whether all are told everything"
CONNECTING_AT_ONCE = 50
FAT_TEXT_BYTES = 60_000
SECONDS = 60
SLOW_CLOSE_CODE = 1008


@dataclass
class Found:
    """What was measured; times in milliseconds, memory in KiB of resident pages."""

    connections: int
    handshake_ms: list[float] = field(default_factory=list)
    connecting_seconds: float = 0
    kib_each: float = 0
    told_ms: list[float] = field(default_factory=list)
    told_beside_slow_one: int | None = None  # like the next: None where there was no slow one
    dropped: int = 0
    slow_close_code: int | None = None


class Client:
    """One connection past its handshake."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self._ids = count(1)
        self.handshake_ms = 0.0

    @classmethod
    async def open(cls, gateway: LiveGateway, *, deflate: bool) -> Self:
        began = time.perf_counter()
        connection = await connect(
            gateway.ws_url,
            proxy=None,
            compression="deflate" if deflate else None,
            max_size=None,
            open_timeout=SECONDS,
        )
        client = cls(connection)
        await client.frame(lambda frame: frame.get("event") == "connect.challenge")
        params = {
            "minProtocol": 4,
            "maxProtocol": 4,
            "client": {"id": "bench", "version": "1", "platform": "linux", "mode": "backend"},
            "auth": {"token": gateway.gateway_token},
        }
        await client.call("connect", params)
        client.handshake_ms = (time.perf_counter() - began) * 1000
        return client

    async def call(self, method: str, params: Any) -> Any:
        asked = str(next(self._ids))
        await self.connection.send(
            json.dumps({"type": "req", "id": asked, "method": method, "params": params})
        )
        response = await self.frame(lambda frame: frame.get("id") == asked)
        assert response["ok"], response
        return response["payload"]

    async def frame(self, is_wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the next frame that is wanted; others are passed over."""
        while True:
            frame: dict[str, Any] = json.loads(await self.connection.recv())
            if is_wanted(frame):
                return frame

    async def told_of(self, event_id: str) -> float:
        """Wait until the gateway tells of an event, and return when that was."""
        await self.frame(
            lambda frame: (
                frame.get("event") == "session.message"
                and frame["payload"]["item"]["id"] == event_id
            )
        )
        return time.perf_counter()


async def measure(
    gateway: LiveGateway, connections: int, deflate: bool, slow_client: bool
) -> Found:
    """Play the whole scenario and return what was measured."""
    found = Found(connections)
    speaker = await Client.open(gateway, deflate=deflate)
    await speaker.call("health", {})
    before = machine.resident_mib(gateways.pid_of(gateway))
    began = time.perf_counter()
    limit = asyncio.Semaphore(CONNECTING_AT_ONCE)

    async def open_one() -> Client:
        async with limit:
            client = await Client.open(gateway, deflate=deflate)
            await client.call("sessions.messages.subscribe", {"key": "bench:all"})
            return client

    clients = await asyncio.gather(*(open_one() for _ in range(connections)))
    found.connecting_seconds = time.perf_counter() - began
    found.handshake_ms = [client.handshake_ms for client in clients]
    grown = machine.resident_mib(gateways.pid_of(gateway)) - before
    found.kib_each = grown * 1024 / connections

    sent_at, told = await _broadcast(speaker, clients, "to everyone")
    found.told_ms = [(at - sent_at) * 1000 for at in told]

    if slow_client:
        await _beside_slow_client(found, gateway, speaker, clients)
    found.dropped = sum(client.connection.close_code is not None for client in clients)
    for client in (*clients, speaker):
        await client.connection.close()
    return found


async def _beside_slow_client(
    found: Found, gateway: LiveGateway, speaker: Client, clients: list[Client]
) -> None:
    """Let one client read no more until the gateway drops it, and see that the others are told."""
    slow = await Client.open(gateway, deflate=False)
    await slow.call("sessions.messages.subscribe", {"key": "bench:slow"})
    # It reads no more: the library stops reading from the socket when nobody takes messages.
    limit_bytes = 50 * 1024 * 1024
    for number in range(limit_bytes // FAT_TEXT_BYTES + 300):
        text = f"{number} {'x' * FAT_TEXT_BYTES}"
        await speaker.call("wake", {"mode": "now", "text": text, "sessionKey": "bench:slow"})
    _, told = await _broadcast(speaker, clients, "beside one that does not read")
    found.told_beside_slow_one = len(told)
    found.slow_close_code = await _close_code(slow)


async def _broadcast(
    speaker: Client, clients: list[Client], text: str
) -> tuple[float, list[float]]:
    """Send an event and return when, and when each client was told of it."""
    # What came before is read first.
    await asyncio.gather(*(client.call("health", {}) for client in clients))
    wake = {"mode": "now", "text": text, "sessionKey": "bench:all"}
    sent_at = time.perf_counter()
    receipt = await speaker.call("wake", wake)
    async with asyncio.timeout(SECONDS):
        told = await asyncio.gather(
            *(client.told_of(receipt["eventId"]) for client in clients), return_exceptions=True
        )
    return sent_at, [at for at in told if isinstance(at, float)]


async def _close_code(client: Client) -> int | None:
    try:
        async with asyncio.timeout(SECONDS):
            while True:
                await client.connection.recv()
    except ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--no-deflate", action="store_true", help="clients that do not compress")
    parser.add_argument("--no-slow-client", action="store_true", help="leave the third step out")


def run(options: argparse.Namespace, directory: Path) -> Report:
    found = play(
        directory,
        options.connections,
        deflate=not options.no_deflate,
        slow_client=not options.no_slow_client,
    )
    report = Report("connections", machine.describe(directory))
    report.add("connections", found.connections)
    report.add("connected in", found.connecting_seconds, "s")
    report.add("memory of the gateway, each", found.kib_each, "KiB")
    report.add_latencies("handshake", [ms / 1000 for ms in found.handshake_ms])
    report.add_latencies("told of one event", [ms / 1000 for ms in found.told_ms])
    for name, told in (
        ("told of one event", len(found.told_ms)),
        ("told beside one that reads not", found.told_beside_slow_one),
    ):
        if told is None:
            continue
        report.add(name, told)
        if told < found.connections:
            report.failures.append(f"{name}: {told} of {found.connections}")
    if found.dropped:
        report.failures.append(f"{found.dropped} connections were dropped")
    if found.told_beside_slow_one is not None and found.slow_close_code != SLOW_CLOSE_CODE:
        report.failures.append(f"the one that reads not was closed with {found.slow_close_code}")
    return report


def play(
    directory: Path, connections: int, *, deflate: bool = True, slow_client: bool = True
) -> Found:
    """Start a gateway in `directory` and measure it."""
    # Both ends of every connection are on this machine, the clients' in this process.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 2 * connections + 200), hard), hard))
    with LiveGateway(directory) as gateway:
        return asyncio.run(measure(gateway, connections, deflate, slow_client))
