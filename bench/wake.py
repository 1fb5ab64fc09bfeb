"""How many wakes a second a gateway takes, and how long each waits for its answer.

    python -m bench wake --url http://127.0.0.1:8000/hooks/wake --token TOKEN [--rate 1000]
    python -m bench wake --self

With a URL, any gateway that has the endpoint is measured; the policy must let requests choose
sessions that begin with --session-prefix. With --self, in turns and in the same run:

1. a bare ASGI function under the same server, our own gateway, and a bare SQLite loop with one
   commit for 32 rows and for each row: the ratios are medians over the rounds;
2. then the gateway at half of the rate that it reached, each latency from the intended time;
3. at the end every event that was answered must be in the database.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench import gateways, machine
from bench.bare import sqlite_rows
from bench.load import Load, Outcome, Wakes
from bench.report import Report, quantile
from bench.serving import Served

HELP = "load on /hooks/wake: of any gateway, or of our own beside a bare server"
WARM_UP_SECONDS = 0.5
# How long requests take at half load: which part of them is slower, and what they should take.
AIMS = (("half load, p99", 0.99, 0.020), ("half load, longest", 1.0, 0.250))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="the gateway's address of /hooks/wake")
    parser.add_argument("--token", default="", help="its hook token")
    parser.add_argument("--self", dest="own", action="store_true", help="our own gateway")
    parser.add_argument("--rate", type=float, help="requests a second; else as many as it takes")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="--self: how often each in turn")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--sessions", type=int, default=50)
    parser.add_argument("--session-prefix", default="hook:bench:")
    parser.add_argument("--same-text", action="store_true", help="let wakes coalesce")
    parser.add_argument(
        "--runner",
        choices=("none", "http"),
        default="none",
        help="--self: http runs heartbeats meanwhile",
    )
    parser.add_argument("--turn-ms", type=int, default=100, help="http: how long each takes")


def run(options: argparse.Namespace, directory: Path) -> Report:
    if options.own:
        return compare(
            directory,
            seconds=options.seconds,
            rounds=options.rounds,
            connections=options.connections,
            sessions=options.sessions,
            turn_ms=options.turn_ms if options.runner == "http" else None,
        )
    if not options.url:
        raise SystemExit("give --url and --token, or --self")
    wakes = Wakes(
        options.url,
        options.token,
        options.sessions,
        options.session_prefix,
        options.same_text,
    )
    report = Report("wake", machine.describe(directory))
    try:
        sending = Load(wakes, connections=options.connections)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    with sending as load:
        if options.rate:
            outcome = load.at_rate(options.rate, options.seconds)
            report.add("wanted", options.rate, "requests/s")
        else:
            outcome = load.closed_loop(options.seconds)
        _tell(report, "wake", outcome)
    return report


def _tell(report: Report, name: str, outcome: Outcome) -> None:
    report.add(f"{name}, stored", outcome.rate, "wakes/s")
    report.add_latencies(name, outcome.latencies)
    for status, count in sorted(outcome.statuses.items()):
        report.add(f"{name}, answers {status}", count)
    if outcome.broken or outcome.unanswered:
        report.failures.append(
            f"{name}: {outcome.broken} connections broke, {outcome.unanswered} had no answer"
        )


@dataclass
class _Server:
    """One of the servers that are compared, and what its rounds found."""

    load: Load
    pid: int
    rates: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)  # of the server, for each request
    generator: float = 0  # the largest part of a core that the generator took
    ids: set[str] = field(default_factory=set)

    def round(self, seconds: float) -> None:
        server, generator = machine.cpu_seconds(self.pid), time.process_time()
        outcome = self.load.closed_loop(seconds)
        self.keep(outcome)
        self.rates.append(outcome.rate)
        spent = machine.cpu_seconds(self.pid) - server
        self.cpu_us.append(spent / max(1, len(outcome.latencies)) * 1e6)
        busy = (time.process_time() - generator) / outcome.seconds
        self.generator = max(self.generator, busy)

    def keep(self, outcome: Outcome) -> None:
        self.ids |= outcome.answered_at.keys()


def compare(
    directory: Path,
    *,
    seconds: float,
    rounds: int,
    connections: int = 32,
    sessions: int = 50,
    turn_ms: int | None = None,
) -> Report:
    """Measure our own gateway beside what it is compared with.

    With `turn_ms` it runs heartbeats, each of which takes its agent so long.
    """
    report = Report("wake", machine.describe(directory), notes=[gateways.NO_LIMIT])
    sqlite: dict[int, list[float]] = {32: [], 1: []}
    with ExitStack() as stack:
        agent = ""
        if turn_ms is not None:
            report.notes.append(f"heartbeats run, and take {turn_ms} ms each")
            agent = gateways.by_http(f"{stack.enter_context(Served('agent')).url}/?{turn_ms}")
        gateway = stack.enter_context(gateways.prepared(directory, agent=agent))
        gateway.start()
        bare = stack.enter_context(Served("bare"))

        def server(url: str, token: str, pid: int) -> _Server:
            wakes = Wakes(f"{url}/hooks/wake", token, sessions)
            load = stack.enter_context(Load(wakes, connections=connections, keep_ids=True))
            made = _Server(load, pid)
            made.keep(load.closed_loop(WARM_UP_SECONDS))
            return made

        ours = server(gateway.url, gateway.hook_token, gateways.pid_of(gateway))
        least = server(bare.url, "", bare.pid)
        idle_mib = machine.resident_mib(ours.pid)
        for _ in range(rounds):
            least.round(seconds)
            ours.round(seconds)
            for rows_each, found in sqlite.items():
                path = directory / f"bare-{rows_each}.sqlite3"
                found.append(sqlite_rows(path, rows_each, seconds / 2))
        half = ours.load.at_rate(median(ours.rates) / 2, seconds)
        ours.keep(half)

        report.add("bare ASGI function", median(least.rates), "requests/s")
        report.add("gateway", median(ours.rates), "wakes/s")
        report.add("bare SQLite, 32 rows a commit", median(sqlite[32]), "rows/s")
        report.add("bare SQLite, 1 row a commit", median(sqlite[1]), "rows/s")
        report.add("bare ASGI function, its processor time", median(least.cpu_us), "µs each")
        report.add("gateway, its processor time", median(ours.cpu_us), "µs each")
        report.add("generator, at the bare function", least.generator, "of a core")
        _tell(report, "half load", half)
        report.add("resident after warming up", idle_mib, "MiB")
        report.add("resident at the end", machine.resident_mib(ours.pid), "MiB")
        report.add("answered", len(ours.ids), "wakes")
        if lost := ours.ids - gateways.stored_events(gateway):
            report.failures.append(f"{len(lost)} answered events are not in the database")
    pairs = list(zip(ours.rates, least.rates, strict=True))
    # While heartbeats run too, it is the latencies that have an aim.
    aim = 0.20 if turn_ms is None else None
    report.ratio("gateway / bare ASGI function", [a / b for a, b in pairs], aim=aim)
    for rows_each, found in sqlite.items():
        report.ratio(
            f"gateway / bare SQLite, {rows_each} a commit",
            [a / b for a, b in zip(ours.rates, found, strict=True)],
        )
    report.ratio(
        "processor time, bare ASGI function / gateway",
        [a / b for a, b in zip(least.cpu_us, ours.cpu_us, strict=True)],
    )
    slowest = sorted(half.latencies)
    for name, part, seconds_at_most in AIMS:
        report.ratio(f"{name} / its aim", [quantile(slowest, part) / seconds_at_most], 1.0, "less")
    return report
