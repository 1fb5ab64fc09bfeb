"""Several processes on PostgreSQL and Redis beside one on SQLite: wakes a second, in turns.

    DATABASE_URL=postgres://… REDIS_URL=redis://… python -m bench workers [--workers 2]

At the end every event that either of them answered must be in its database.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from django.conf import settings

from bench import gateways, machine
from bench.load import Load, Wakes
from bench.report import Report
from tests.live import LiveGateway

HELP = "several processes on PostgreSQL and Redis beside one on SQLite"
WARM_UP_SECONDS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="how often each in turn")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--sessions", type=int, default=50)


def run(options: argparse.Namespace, directory: Path) -> Report:
    if not settings.DATABASES["default"]["ENGINE"].endswith("postgresql"):
        raise SystemExit("set DATABASE_URL to a PostgreSQL server")
    if not settings.REDIS_URL:
        raise SystemExit("set REDIS_URL")
    return compare(
        directory,
        workers=options.workers,
        seconds=options.seconds,
        rounds=options.rounds,
        connections=options.connections,
        sessions=options.sessions,
    )


def compare(
    directory: Path,
    *,
    workers: int,
    seconds: float,
    rounds: int,
    connections: int = 32,
    sessions: int = 50,
) -> Report:
    """Measure both in turns; the ratio is the median over the rounds."""
    report = Report("workers", machine.describe(directory), notes=[gateways.NO_LIMIT])
    with ExitStack() as stack:

        def started(name: str, environment: dict[str, str], *arguments: str) -> LiveGateway:
            (place := directory / name).mkdir()
            gateway = stack.enter_context(gateways.prepared(place, environment=environment))
            gateway.arguments = arguments
            gateway.start()
            return gateway

        sqlite_url = f"sqlite:///{directory}/sqlite/wake.sqlite3"
        one = started("sqlite", {"DATABASE_URL": sqlite_url})
        several = started(
            "postgresql", {"REDIS_URL": os.environ["REDIS_URL"]}, "--workers", str(workers)
        )
        loads: dict[str, Load] = {}
        rates: dict[str, list[float]] = {}
        answered: dict[str, set[str]] = {}
        named = {"SQLite, one process": one, f"PostgreSQL, {workers} workers": several}
        for name, gateway in named.items():
            wakes = Wakes(f"{gateway.url}/hooks/wake", gateway.hook_token, sessions)
            loads[name] = stack.enter_context(Load(wakes, connections=connections, keep_ids=True))
            rates[name] = []
            answered[name] = set(loads[name].closed_loop(WARM_UP_SECONDS).answered_at)
        for _ in range(rounds):
            for name, load in loads.items():
                outcome = load.closed_loop(seconds)
                rates[name].append(outcome.rate)
                answered[name] |= outcome.answered_at.keys()
        for name, gateway in named.items():
            report.add(name, median(rates[name]), "wakes/s")
            report.add(f"{name}, answered", len(answered[name]), "wakes")
            if lost := answered[name] - gateways.stored_events(gateway):
                report.failures.append(f"{name}: {len(lost)} answered events are not stored")
    of_one, of_several = rates.values()
    pairs = zip(of_several, of_one, strict=True)
    report.ratio("PostgreSQL / SQLite", [a / b for a, b in pairs], aim=0.8)
    return report
