"""From the answer to a wake to the start of its runner, end to end, on the default database.

    python -m bench latency [--rate 50] [--sessions 50] [--runner http|command] [--places 16]

Wakes are sent at a fixed rate. With the http runner the start is when the heartbeat arrives at the
agent; with the command runner, when a program that does no more than look at the clock has done
that. A runner may start before the sender has read its answer: then the latency is negative.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import msgspec

from bench import gateways, machine
from bench.load import Load, Wakes
from bench.report import Report, quantile
from bench.serving import Served
from tests.live import LiveGateway

HELP = "from the answer to a wake to the start of its runner"
# For what is imported at the first heartbeat.
WARM_UP_SECONDS = 1.0
ARRIVAL_SECONDS = 30.0
PROGRAM = 'date +%s.%N > "$0/$OPENCLAW_RUN_ID"'
RUNS = (
    "from wake.models import SystemEvent\n"
    "events = SystemEvent.objects.filter(heartbeat__isnull=False)\n"
    "for uid, run in events.values_list('uid', 'heartbeat__run_id').iterator(): print(uid, run)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rate", type=float, default=50, help="wakes a second")
    parser.add_argument("--sessions", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--runner", choices=("http", "command"), default="http")
    parser.add_argument("--places", type=int, default=16, help="heartbeats side by side")


def run(options: argparse.Namespace, directory: Path) -> Report:
    return measure(
        directory,
        rate=options.rate,
        sessions=options.sessions,
        seconds=options.seconds,
        connections=options.connections,
        runner=options.runner,
        places=options.places,
    )


def measure(
    directory: Path,
    *,
    rate: float,
    sessions: int,
    seconds: float,
    connections: int = 32,
    runner: str = "http",
    places: int = 16,
) -> Report:
    report = Report("latency", machine.describe(directory), notes=[gateways.NO_LIMIT])
    report.notes.append(
        f"runner {runner}, {rate:g} wakes a second over {sessions} sessions, "
        f"{places} heartbeats side by side"
    )
    inbox = directory / "inbox"
    inbox.mkdir()
    with ExitStack() as stack:
        if runner == "http":
            served = stack.enter_context(Served("agent"))
            agent = gateways.by_http(served.url)
        else:
            command = ["/bin/sh", "-c", PROGRAM, str(inbox)]
            agent = f"agent.runner, agent.command = 'command', {command!r}"
        agent += f"\nsettings.max_parallel_heartbeats = {places}\nsettings.save()"
        gateway = stack.enter_context(gateways.prepared(directory, agent=agent))
        gateway.start()
        wakes = Wakes(f"{gateway.url}/hooks/wake", gateway.hook_token, sessions)
        load = stack.enter_context(Load(wakes, connections=connections, keep_ids=True))
        load.at_rate(min(rate, 50), WARM_UP_SECONDS)
        outcome = load.at_rate(rate, seconds)
        wanted = outcome.answered_at
        deadline = time.monotonic() + ARRIVAL_SECONDS
        while True:
            started = _arrivals(served.url) if runner == "http" else _programs(gateway, inbox)
            if wanted.keys() <= started.keys() or time.monotonic() > deadline:
                break
            time.sleep(0.5)
    waits = sorted(started[uid] - at for uid, at in wanted.items() if uid in started)
    report.add("answered", len(wanted), "wakes")
    report.add("stored", outcome.rate, "wakes/s")
    report.add_latencies("answer to runner", waits)
    report.add_latencies("wake to answer", outcome.latencies)
    report.add("started within 50 ms", 100 * sum(w <= 0.05 for w in waits) / len(wanted), "%")
    aim = 0.010 if rate <= 50 else 0.025
    report.ratio("median / its aim", [quantile(waits, 0.5) / aim], aim=1.0, better="less")
    if len(waits) < len(wanted):
        report.failures.append(f"{len(wanted) - len(waits)} wakes never reached the runner")
    if outcome.broken or outcome.unanswered:
        report.failures.append(f"{outcome.broken + outcome.unanswered} wakes had no answer")
    return report


def _arrivals(url: str) -> dict[str, float]:
    with build_opener(ProxyHandler({})).open(url) as answer:
        return msgspec.json.decode(answer.read(), type=dict[str, float])


def _programs(gateway: LiveGateway, inbox: Path) -> dict[str, float]:
    """Return when each event's first program looked at the clock, in the time of monotonic()."""
    ahead = time.time() - time.monotonic()
    looked = {path.name: path.read_text() for path in inbox.iterdir()}
    started: dict[str, float] = {}
    for line in gateway.manage("shell", "-v0", "-c", RUNS).stdout.splitlines():
        uid, run_id = line.split()
        if at := looked.get(run_id):
            started[uid] = float(at) - ahead
    return started
