"""How soon a gateway serves on a migrated database, and how much memory it takes.

    python -m bench start [--wakes 1000000]

Ready is when it says so, which it does when it has answered its first request. Memory is what is
resident then, and after so many wakes over enough sessions.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

from bench import gateways, machine
from bench.load import Load, Wakes
from bench.report import Report

HELP = "time until it serves, and resident memory"
AIM_SECONDS = 2.0
AIM_MIB = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--wakes", type=int, default=10_000)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--sessions", type=int, default=50)


def run(options: argparse.Namespace, directory: Path) -> Report:
    return measure(
        directory,
        rounds=options.rounds,
        wakes=options.wakes,
        connections=options.connections,
        sessions=options.sessions,
    )


def measure(
    directory: Path, *, rounds: int, wakes: int, connections: int = 32, sessions: int = 50
) -> Report:
    report = Report("start", machine.describe(directory), notes=[gateways.NO_LIMIT])
    ready: list[float] = []
    with gateways.prepared(directory) as gateway:
        # The first start makes the first user and tokens; it is not one of those that are timed.
        for number in range(rounds + 1):
            gateway.stop()
            began = time.monotonic()
            gateway.start()
            if number:
                ready.append(time.monotonic() - began)
        pid = gateways.pid_of(gateway)
        at_start = machine.resident_mib(pid)
        load = Wakes(f"{gateway.url}/hooks/wake", gateway.hook_token, sessions)
        with Load(load, connections=connections) as sending:
            outcome = sending.number(wakes)
        report.add("ready after", median(ready), "s")
        report.add("resident when ready", at_start, "MiB")
        report.add(f"resident after {wakes:,} wakes", machine.resident_mib(pid), "MiB")
        report.ratio("ready / its aim", [median(ready) / AIM_SECONDS], 1.0, "less")
        report.ratio("memory / its aim", [machine.resident_mib(pid) / AIM_MIB], 1.0, "less")
        if outcome.statuses[200] < wakes:
            report.failures.append(f"{wakes - outcome.statuses[200]} wakes were not stored")
    return report
