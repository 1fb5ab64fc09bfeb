"""`manage.py heartbeats` as a real process: it serves, and it stops when it is told to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.wake.processes import is_alive

MANAGE = Path(__file__).resolve().parents[2] / "manage.py"
WAIT_SECONDS = 30


class Machine:
    """A directory with a database, and commands that run in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            **os.environ,
            "DATABASE_URL": f"sqlite:///{directory / 'db.sqlite3'}",
            "SECRET_KEY": "only-for-tests",
        }

    def manage(self, *arguments: str) -> str:
        """Run another command of manage.py and return what it printed."""
        command = [sys.executable, str(MANAGE), *arguments]
        return subprocess.run(
            command, cwd=self.directory, env=self.environment, check=True, stdout=subprocess.PIPE
        ).stdout.decode()

    def program(self, script: str) -> None:
        """Write the agent's program, a shell script."""
        (self.directory / "program.sh").write_text(script)

    def session(self, key: str) -> tuple[int, str | None, str | None]:
        """Return a session's queued events, when it is due, and its lease."""
        with closing(sqlite3.connect(self.directory / "db.sqlite3")) as database:
            return database.execute(  # type: ignore[no-any-return]
                "SELECT queued, due_at, lease_token FROM wake_session WHERE key = ?", [key]
            ).fetchone()

    @contextmanager
    def heartbeats(self) -> Iterator[subprocess.Popen[str]]:
        """Run the command; it is ready."""
        with subprocess.Popen(
            [sys.executable, MANAGE, "heartbeats"],
            cwd=self.directory,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout
                assert process.stdout.readline() == "heartbeats ready\n"
                yield process
            finally:
                process.kill()

    def read(self, name: str) -> str:
        path = self.directory / name
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose default agent runs program.sh, and has one event to deliver."""
    machine = Machine(tmp_path_factory.mktemp("prepared"))
    machine.manage(
        "shell",
        "-c",
        "from django.core.management import call_command as call\n"
        "call('migrate', verbosity=0)\n"
        "call('agents', 'set', 'main', program=['/bin/sh', 'program.sh'])\n"
        "call('system_event', 'work', session_key='x')\n",
    )
    return machine.directory


@pytest.fixture
def machine(tmp_path: Path, prepared: Path) -> Machine:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return Machine(tmp_path)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


def test_an_event_from_another_process_reaches_the_agent(machine: Machine) -> None:
    machine.program("cat >> inbox.txt")
    with machine.heartbeats() as process:
        receipt = json.loads(
            machine.manage(
                "system_event", "CI finished: 214 passed", "--session-key", "ci:1", "--json"
            )
        )
        stored = time.monotonic()
        wait_for(lambda: receipt["eventId"] in machine.read("inbox.txt"))
        assert time.monotonic() - stored < 5
        assert "CI finished: 214 passed" in machine.read("inbox.txt")
        process.terminate()
        assert process.wait(WAIT_SECONDS) == 0


def test_a_signal_ends_the_agent_and_gives_its_events_back(machine: Machine) -> None:
    machine.program("echo $$ > pid; exec sleep 300")
    with machine.heartbeats() as process:
        wait_for(lambda: machine.read("pid").endswith("\n"))
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_SECONDS) == 0
    assert not is_alive(int(machine.read("pid")))
    queued, due_at, lease = machine.session("agent:main:x")
    assert (queued, due_at is not None, lease) == (1, True, None)


def test_a_second_signal_stops_at_once(machine: Machine) -> None:
    machine.program(
        "trap 'echo asked > asked' TERM; echo $$ > pid; while :; do sleep 0.05; done",
    )
    with machine.heartbeats() as process:
        wait_for(lambda: machine.read("pid").endswith("\n"))
        process.terminate()
        wait_for(lambda: machine.read("asked"))
        process.terminate()
        assert process.wait(WAIT_SECONDS) == 1
        assert process.stderr
        assert process.stderr.read().splitlines()[-1].startswith("CommandError: stopped at once")
    wait_for(lambda: not is_alive(int(machine.read("pid"))))


def test_a_database_without_tables_is_one_clear_line(tmp_path: Path) -> None:
    environment = {**os.environ, "DATABASE_URL": f"sqlite:///{tmp_path / 'empty.sqlite3'}"}
    failed = subprocess.run(
        [sys.executable, MANAGE, "heartbeats"], env=environment, capture_output=True, text=True
    )
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == (
        "CommandError: the database is not migrated; run manage.py migrate first\n"
    )
