"""`manage.py agent_client` as real processes, beside a real gateway."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tests.live import ROOT, LiveGateway
from tests.wake.gateway_server import Json, Wire, connected
from tests.wake.processes import is_alive

LEASE_SECONDS = 2
# Where only the frozen one is to lose it, however busy the machine is.
LONGER_LEASE = 5
WAIT_SECONDS = 30

# The whole of it is 300 sessions and 3,000 events; it takes some minutes.
SESSIONS = int(os.environ.get("AGENT_CLIENT_SESSIONS", "30"))
EVENTS = 10 * SESSIONS

# What happens in a session is told by a directory that can be made once only, and by a log. The
# program of a client that was killed was killed with it; then what it left does not count. What a
# program does begins with its prompt, which a client that is frozen just then has not given to it.
AGENT = """
events=$(sed -n 's/^payload //p' | tr '\\n' ' ')
lock="$0/lock-$OPENCLAW_SESSION_KEY"
if ! mkdir "$lock" 2>/dev/null &&
    grep -q '^State:.[^Z]' "/proc/$(cat "$lock/pid")/status" 2>/dev/null; then
    echo "$OPENCLAW_SESSION_KEY" >> "$0/at-the-same-time"
fi
echo $$ > "$lock/pid"
sleep 0.1
echo "$CLIENT $OPENCLAW_RUN_ID $OPENCLAW_SESSION_KEY $events" >> "$0/runs"
rm -r "$lock"
"""


class Client:
    """`manage.py agent_client` for the agent main, which needs no database."""

    def __init__(
        self,
        gateway: LiveGateway,
        *command: str,
        arguments: tuple[str, ...] = (),
        token: str = "",
        url: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._errors = (gateway.directory / f"client-{time.monotonic_ns()}.log").open("w+")
        self.process = subprocess.Popen(
            [
                sys.executable,
                ROOT / "manage.py",
                "agent_client",
                *("--url", url or gateway.ws_url, "--agent", "main"),
                *arguments,
                "--",
                *command,
            ],
            cwd=gateway.directory,
            env={
                **os.environ,
                "DATABASE_URL": "sqlite:////nowhere/at/all.sqlite3",
                "SECRET_KEY": "only-for-tests",
                "OPENCLAW_GATEWAY_TOKEN": token or gateway.gateway_token,
                **(environment or {}),
            },
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        self._errors.close()

    def ready(self) -> Self:
        assert self.process.stdout
        assert self.process.stdout.readline() == "agent client ready\n", self.errors
        return self

    @property
    def errors(self) -> str:
        self._errors.flush()
        return Path(self._errors.name).read_text()

    def programs(self) -> list[int]:
        """Return the processes that it has started and that run now."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(parent) == self.process.pid and state != "Z":
                found.append(int(stat.parent.name))
        return found

    def has_programs(self) -> None:
        """Wait until programs of it are under way."""
        wait_for(self.programs)

    def freeze(self) -> list[int]:
        """Stop it while programs of it are under way, and return these.

        One that has just begun does not say yet what it was started for; one that ends, no more.
        """
        while True:
            self.has_programs()
            self.process.send_signal(signal.SIGSTOP)
            wait_for(lambda: state_of(self.process.pid) == "T")
            programs = self.programs()
            if any(map(run_of, programs)):
                return programs
            self.process.send_signal(signal.SIGCONT)

    def die(self) -> None:
        """End it and its programs as the end of their machine would."""
        for program in self.freeze():
            with suppress(ProcessLookupError):
                os.kill(program, signal.SIGKILL)
        self.process.kill()


def run_of(pid: int) -> str:
    """Return the run that a program was started for, or nothing where it has just ended."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (OSError, ProcessLookupError):
        return ""
    found = (entry for entry in environment if entry.startswith(b"OPENCLAW_RUN_ID="))
    return next(found, b"=").partition(b"=")[2].decode()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(condition: Callable[[], object], seconds: float = WAIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)


def use_inbox(gateway: LiveGateway) -> None:
    gateway.manage("agents", "set", "main", "--every", "off", "--runner", "inbox")


def asking(gateway: LiveGateway) -> Wire:
    return connected(gateway.ws_url, auth={"token": gateway.gateway_token})


def wake(wire: Wire, text: str, key: str) -> str:
    """Wake a session and return its key."""
    receipt = wire.payload("wake", {"mode": "now", "text": text, "sessionKey": key})
    return str(receipt["sessionKey"])


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    """A gateway whose agent main has the runner inbox, and whose leases are short."""
    directory = tmp_path_factory.mktemp("gateway")
    with LiveGateway(
        directory,
        arguments=("--no-heartbeats",),
        environment={"HEARTBEAT_LEASE_SECONDS": str(LEASE_SECONDS)},
    ) as live:
        use_inbox(live)
        yield live


@pytest.fixture
def wire(gateway: LiveGateway) -> Iterator[Wire]:
    with asking(gateway) as connection:
        yield connection


def ended(wire: Wire, key: str, status: str = "") -> Json:
    """Return the newest run of a session once it has ended, in this status if one is given."""
    found: list[Json] = []

    def has_ended() -> bool:
        items = wire.payload("sessions.history", {"key": key})["items"]
        found[:] = [item for item in items if item["kind"] == "heartbeat"][:1]
        return any(
            run["status"] == status if status else run["status"] != "running" for run in found
        )

    wait_for(has_ended)
    return found[0]


# --- What it must show ----------------------------------------------------------------------------


def test_three_clients_share_the_work_though_one_is_killed_and_one_is_frozen(
    tmp_path: Path,
) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    log = inbox / "runs"

    def runs() -> list[list[str]]:
        return [line.split() for line in log.read_text().splitlines()] if log.exists() else []

    def delivered() -> set[int]:
        return {int(event) for run in runs() for event in run[3:]}

    with ExitStack() as stack:
        gateway = stack.enter_context(
            LiveGateway(tmp_path, environment={"HEARTBEAT_LEASE_SECONDS": str(LONGER_LEASE)})
        )
        use_inbox(gateway)
        killed, frozen, good = (
            stack.enter_context(
                Client(
                    gateway,
                    *("/bin/sh", "-c", AGENT, str(inbox)),
                    arguments=("--capacity", "4"),
                    environment={"CLIENT": name},
                )
            )
            for name in ("killed", "frozen", "good")
        )
        for client in (killed, frozen, good):
            client.ready()
        sender = threading.Thread(target=_send, args=(gateway,), daemon=True)
        sender.start()
        wait_for(lambda: len(delivered()) > EVENTS / 10, 60)

        killed.die()
        # What it has when it freezes: the programs end, and it cannot tell anybody.
        late = {run_of(program) for program in frozen.freeze()} - {""}
        time.sleep(1.5 * LONGER_LEASE)
        given = Counter(run[0] for run in runs())
        frozen.process.send_signal(signal.SIGCONT)
        wait_for(lambda: len(delivered()) == EVENTS, 240)
        sender.join(60)
        with asking(gateway) as wire:
            wait_for(lambda: wire.payload("health")["queue"]["queued"] == 0)
            assert wire.payload("health")["queue"]["dead"] == 0
            ended = {run: wire.payload("heartbeats.get", {"runId": run})["status"] for run in late}
        for client in (frozen, good):
            client.process.terminate()
            assert client.process.wait(WAIT_SECONDS) == 0, client.errors

    assert not (inbox / "at-the-same-time").exists()
    by_session: dict[str, list[int]] = defaultdict(list)
    for _, _, session, *events in runs():
        # What a lost run had comes again: at least once, and still in order.
        by_session[session] += [int(one) for one in events if int(one) not in by_session[session]]
    assert by_session == {
        f"agent:main:s{number}": list(range(number, EVENTS, SESSIONS)) for number in range(SESSIONS)
    }
    # Refused where it was given at all: whether it says so before it hears that the run is lost.
    assert late
    assert set(ended.values()) == {"lost"}
    shares = Counter(run[0] for run in runs())
    assert min(shares.values()) > 0
    assert shares["killed"] == given["killed"]


def _send(gateway: LiveGateway) -> None:
    """Send all events, a few at a time, so that each session gets its own in their order."""
    at_once = min(20, SESSIONS)
    with asking(gateway) as wire:
        for first in range(0, EVENTS, at_once):
            numbers = range(first, min(first + at_once, EVENTS))
            asked = [
                wire.ask(
                    "wake",
                    {
                        "mode": "now",
                        "text": f"payload {number}",
                        "sessionKey": f"s{number % SESSIONS}",
                    },
                )
                for number in numbers
            ]
            answers = {frame["id"]: frame for frame in (wire.response() for _ in asked)}
            assert all(answers[request]["ok"] for request in asked), answers


# --- One client -----------------------------------------------------------------------------------


def test_it_runs_its_program_for_each_heartbeat(gateway: LiveGateway, wire: Wire) -> None:
    program = "cat; env | grep '^OPENCLAW_' | sort; echo end"
    with Client(gateway, "/bin/sh", "-c", program) as client:
        client.ready()
        key = wake(wire, "größer", "runs:1")
        run = ended(wire, key)
        assert run["status"] == "delivered"
        reply = str(wire.payload("heartbeats.get", {"runId": run["id"]})["reply"])
        assert "größer" in reply
        assert reply.splitlines()[-5:] == [
            "OPENCLAW_AGENT_ID=main",
            "OPENCLAW_REASON=wake",
            f"OPENCLAW_RUN_ID={run['id']}",
            f"OPENCLAW_SESSION_KEY={key}",
            "end",
        ]
        client.process.send_signal(signal.SIGINT)
        assert client.process.wait(WAIT_SECONDS) == 0
        assert client.errors == ""


def test_a_program_that_fails_is_a_failed_attempt(gateway: LiveGateway, wire: Wire) -> None:
    with Client(gateway, "/bin/sh", "-c", "echo no such model >&2; exit 3") as client:
        client.ready()
        key = wake(wire, "work", "fails:1")
        run = ended(wire, key)
        assert (run["status"], run["error"]) == ("failed", "exit status 3: no such model")
        assert "no such model" not in client.errors
        assert f"run {run['id']} of {key} failed" in client.errors
    with Client(gateway, "/bin/cat") as client:
        client.ready()
        assert ended(wire, key, "delivered")["attempt"] > 1


def test_a_long_run_keeps_its_lease(gateway: LiveGateway, wire: Wire) -> None:
    with Client(gateway, "/bin/sh", "-c", f"sleep {2 * LEASE_SECONDS}; echo late") as client:
        client.ready()
        run = ended(wire, wake(wire, "work", "long:1"))
        assert (run["status"], run["attempt"], client.errors) == ("delivered", 1, "")


def test_the_first_signal_ends_the_program_and_gives_its_run_back(
    gateway: LiveGateway, wire: Wire
) -> None:
    with Client(gateway, "/bin/sleep", "300") as client:
        client.ready()
        key = wake(wire, "work", "stops:1")
        client.has_programs()
        (program,) = client.programs()
        client.process.terminate()
        assert client.process.wait(WAIT_SECONDS) == 0
        assert not is_alive(program)
    assert ended(wire, key)["status"] == "released"
    with Client(gateway, "/bin/cat") as client:
        client.ready()
        assert ended(wire, key, "delivered")["attempt"] == 1


def test_a_second_signal_stops_at_once(gateway: LiveGateway, wire: Wire) -> None:
    asked = gateway.directory / "asked"
    program = f"trap 'echo asked > {asked}' TERM; while :; do sleep 0.05; done"
    with Client(gateway, "/bin/sh", "-c", program) as client:
        client.ready()
        wake(wire, "work", "stops:2")
        client.has_programs()
        (program_id,) = client.programs()[:1]
        client.process.terminate()
        wait_for(asked.exists)
        client.process.terminate()
        assert client.process.wait(WAIT_SECONDS) == 1
        assert "stopped at once" in client.errors.splitlines()[-1]
    wait_for(lambda: not is_alive(program_id))
    with Client(gateway, "/bin/cat") as client:
        client.ready()
        ended(wire, "stops:2", "delivered")


def test_when_the_lease_is_lost_the_program_is_ended(gateway: LiveGateway, wire: Wire) -> None:
    with Client(gateway, "/bin/sleep", "300") as client:
        client.ready()
        key = wake(wire, "work", "frozen:1")
        client.has_programs()
        (program,) = client.programs()
        client.process.send_signal(signal.SIGSTOP)
        assert ended(wire, key)["status"] == "lost"
        wire.payload("set-heartbeats", {"enabled": False})
        try:
            client.process.send_signal(signal.SIGCONT)
            wait_for(lambda: not is_alive(program))
            wait_for(lambda: "its program was ended" in client.errors)
        finally:
            wire.payload("set-heartbeats", {"enabled": True})
        # It has a place again.
        client.has_programs()
        client.process.terminate()
        assert client.process.wait(WAIT_SECONDS) == 0
    with Client(gateway, "/bin/cat") as client:
        client.ready()
        ended(wire, key, "delivered")


def test_it_connects_again_after_a_restart(tmp_path: Path) -> None:
    with LiveGateway(tmp_path) as live:
        use_inbox(live)
        with Client(live, "/bin/cat") as client:
            client.ready()
            live.kill()
            wait_for(lambda: "trying again in" in client.errors)
            live.start(port=live.port)
            wait_for(lambda: "attached again" in client.errors)
            with asking(live) as wire:
                assert ended(wire, wake(wire, "work", "again:1"))["status"] == "delivered"
            live.stop()
            client.process.terminate()
            assert client.process.wait(WAIT_SECONDS) == 0


@pytest.mark.parametrize(
    ("options", "status", "error"),
    [
        ({"token": "ocg_wrong"}, 1, "unauthorized: gateway token mismatch"),
        ({"arguments": ("--agent", "nobody")}, 1, 'unknown agent "nobody"'),
        ({"url": "nowhere"}, 1, "looks like ws://HOST:PORT"),
        ({"url": "ws://user:secret@:0/x"}, 1, "looks like ws://HOST:PORT"),
        ({"arguments": ("--capacity", "0")}, 2, "give a number from 1 to 1000"),
    ],
)
def test_what_stays_wrong_ends_it_with_one_line(
    gateway: LiveGateway, options: dict[str, Any], status: int, error: str
) -> None:
    with Client(gateway, "/bin/cat", **options) as client:
        assert client.process.wait(WAIT_SECONDS) == status
        assert error in client.errors
        assert "secret" not in client.errors
        if status == 1:
            assert len(client.errors.splitlines()) == 1


def test_without_a_gateway_it_waits_for_one_and_can_be_stopped(gateway: LiveGateway) -> None:
    with Client(gateway, "/bin/cat", url="ws://127.0.0.1:9/") as client:
        wait_for(lambda: client.errors.count("trying again in") >= 2)
        assert "cannot connect to ws://127.0.0.1:9/" in client.errors
        client.process.terminate()
        assert client.process.wait(WAIT_SECONDS) == 0
