"""Kill the gateway again and again while it takes and delivers events; then count.

    python -m bench crash [--events 500] [--sessions 50] [--kills 5]

Senders post to /hooks/wake and try again until they are answered. The gateway is ended with
SIGKILL at random moments and started anew. At the end:

* every acknowledged event was delivered;
* in each session in the order of the acknowledgements;
* an event came twice only if a heartbeat that had taken it was interrupted.

Runs on SQLite, or on the PostgreSQL server that DATABASE_URL names (in a database of its own).
"""

from __future__ import annotations

import argparse
import random
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from bench import machine
from bench.report import Report
from tests.live import LiveGateway

HELP = "kill the gateway again and again, and count what was lost"

# One file for each run, under its name only when it is whole; `sleep` makes runs long enough for
# a kill to hit them.
AGENT = 'file=$0/$OPENCLAW_RUN_ID; cat > "$file.part"; sleep 0.1; mv "$file.part" "$file"'
ALLOW_KEYS = (
    "from hooks.models import *; p = HookPolicy.ensure(); p.allow_request_session_key = True; "
    "p.save(); AllowedSessionPrefix.objects.get_or_create(prefix='hook:')"
)
INTERRUPTED_RUNS = (
    "from wake.models import Heartbeat; "
    "print(*Heartbeat.objects.exclude(status__in=['delivered', 'quiet'])"
    ".values_list('run_id', flat=True), sep='\\n')"
)


@dataclass
class Count:
    """What was counted. `acknowledged` and `delivered` are event ids by session, in order."""

    acknowledged: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    delivered: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    runs: dict[str, list[str]] = field(default_factory=dict)
    interrupted: set[str] = field(default_factory=set)
    kills: int = 0
    retries: int = 0
    seconds: float = 0

    def lost(self) -> list[str]:
        """Return the acknowledged events that never reached the agent."""
        arrived = {event for events in self.delivered.values() for event in events}
        return [e for events in self.acknowledged.values() for e in events if e not in arrived]

    def out_of_order(self) -> list[str]:
        """Return the sessions whose events came in another order than they were acknowledged."""
        wrong = []
        for session, order in self.acknowledged.items():
            first_arrivals = list(dict.fromkeys(self.delivered[session]))
            acknowledged = set(order)
            if [event for event in first_arrivals if event in acknowledged] != order:
                wrong.append(session)
        return wrong

    def repeated(self) -> list[str]:
        """Return the events that came more than once."""
        counts = Counter(event for events in self.delivered.values() for event in events)
        return [event for event, count in counts.items() if count > 1]

    def repeated_without_cause(self) -> list[str]:
        """Return the events that came again though no run that had taken them was interrupted."""
        completed = Counter(
            event
            for run, events in self.runs.items()
            if run not in self.interrupted
            for event in events
        )
        return [event for event, count in completed.items() if count > 1]


def play(directory: Path, *, events: int, sessions: int, kills: int, lease: float = 2) -> Count:
    """Play the whole scenario in `directory` and return what was counted."""
    count = Count()
    inbox = directory / "inbox"
    inbox.mkdir()
    began = time.monotonic()
    with LiveGateway(directory, environment={"HEARTBEAT_LEASE_SECONDS": str(lease)}) as gateway:
        gateway.manage("shell", "-c", ALLOW_KEYS)
        gateway.manage(
            "agents", "set", "main", "--every", "off", "--", "/bin/sh", "-c", AGENT, str(inbox)
        )
        senders = [
            threading.Thread(target=_send, args=(gateway, count, events // sessions, group))
            for group in _groups(sessions, 8)
        ]
        for sender in senders:
            sender.start()
        for number in range(1, kills + 1):
            # Each kill waits for its share of the events, so that all of them hit the traffic.
            _wait(lambda number=number: _acknowledged(count) >= events * number / (kills + 1))  # type: ignore[misc]
            _wait(lambda: any(inbox.glob("*.part")), 1)  # while a run is under way
            time.sleep(random.uniform(0, 0.05))
            gateway.kill()
            count.kills += 1
            gateway.start(port=gateway.port)
        for sender in senders:
            sender.join()
        _wait(lambda: not _missing(count, inbox), 60)
        interrupted = gateway.manage("shell", "-v0", "-c", INTERRUPTED_RUNS).stdout
        count.interrupted = set(interrupted.split())
    _read_inbox(count, inbox)
    count.seconds = time.monotonic() - began
    return count


def _groups(sessions: int, count: int) -> list[list[str]]:
    keys = [f"hook:crash-{number}" for number in range(sessions)]
    return [keys[start::count] for start in range(count)]


def _send(gateway: LiveGateway, count: Count, events: int, keys: list[str]) -> None:
    headers = {"Authorization": f"Bearer {gateway.hook_token}"}
    with httpx.Client(headers=headers, timeout=10) as client:
        for number in range(events):
            for key in keys:
                body = {"text": f"event {number} of {key}", "sessionKey": key}
                while True:
                    try:
                        answer = client.post(f"{gateway.url}/hooks/wake", json=body)
                        answer.raise_for_status()
                    except httpx.HTTPError:
                        count.retries += 1
                        time.sleep(0.05)
                        continue
                    receipt = answer.json()
                    order = count.acknowledged[receipt["sessionKey"]]
                    # A repeat of an event whose answer was lost may stand for one that waits.
                    if receipt["eventId"] not in order:
                        order.append(receipt["eventId"])
                    break


def _acknowledged(count: Count) -> int:
    return sum(len(order) for order in list(count.acknowledged.values()))


def _missing(count: Count, inbox: Path) -> set[str]:
    _read_inbox(count, inbox)
    return set(count.lost())


def _read_inbox(count: Count, inbox: Path) -> None:
    """Read what the agent was given, in the order of the runs: their ids begin with their time."""
    count.delivered.clear()
    count.runs.clear()
    for path in sorted(inbox.iterdir()):
        run_id = path.name.removesuffix(".part")
        try:
            prompt = path.read_text()
        except FileNotFoundError:  # renamed since it was listed
            prompt = (inbox / run_id).read_text()
        count.runs[run_id] = re.findall(r"^\[\S+\] System event (\S+) ", prompt, re.MULTILINE)
        if session := re.search(r"^event \d+ of (\S+)$", prompt, re.MULTILINE):
            count.delivered[f"agent:main:{session[1]}"] += count.runs[run_id]


def _wait(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--events", type=int, default=500)
    parser.add_argument("--sessions", type=int, default=50)
    parser.add_argument("--kills", type=int, default=5)


def run(options: argparse.Namespace, directory: Path) -> Report:
    count = play(directory, events=options.events, sessions=options.sessions, kills=options.kills)
    report = Report("crash", machine.describe(directory))
    report.add("kills", count.kills)
    report.add("all of it took", count.seconds, "s")
    report.add("requests tried again", count.retries)
    report.add("acknowledged", _acknowledged(count))
    report.add("came twice", len(count.repeated()))
    for name, wrong in (
        ("lost", count.lost()),
        ("sessions out of order", count.out_of_order()),
        ("came twice without an interrupted heartbeat", count.repeated_without_cause()),
    ):
        report.add(name, len(wrong))
        if wrong:
            report.failures.append(f"{name}: {len(wrong)}")
    return report
