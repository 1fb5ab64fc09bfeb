"""A real gateway in a process of its own, on a database of its own."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from django.conf import settings

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 60


class LiveGateway:
    """`manage.py gateway` on a free port. Tests on PostgreSQL get a fresh database there.

    `directory` is the process's working directory and holds what it writes. `beside` is a gateway
    whose database, and with it its tokens, this one shares.
    """

    url: str
    ws_url: str
    gateway_token: str
    hook_token: str
    admin_password: str

    def __init__(
        self,
        directory: Path,
        *,
        arguments: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        beside: LiveGateway | None = None,
    ) -> None:
        self.directory = directory
        self.arguments = arguments
        self._postgresql = settings.DATABASES["default"]["ENGINE"].endswith("postgresql")
        self._database_name = f"live_{secrets.token_hex(6)}"
        self.environment = {
            **os.environ,
            "DATABASE_URL": beside.database_url if beside else self._make_database(),
            "SECRET_KEY": "only-for-tests",
            "PYTHONUNBUFFERED": "1",
            **(environment or {}),
        }
        self._owns_database = beside is None
        if beside:
            self.gateway_token, self.hook_token = beside.gateway_token, beside.hook_token
        self.process: subprocess.Popen[str] | None = None
        self.output: list[str] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        self.drop_database()

    def start(self, *, port: int = 0) -> None:
        """Start the process and wait until it says that it is ready."""
        ready = threading.Event()
        with (self.directory / "gateway.log").open("a") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    ROOT / "manage.py",
                    "gateway",
                    "--port",
                    str(port),
                    *self.arguments,
                ],
                cwd=self.directory,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        threading.Thread(target=self._read, args=(self.process, ready), daemon=True).start()
        if not ready.wait(START_SECONDS) or self.process.poll() is not None:
            self.stop()
            raise AssertionError(f"the gateway did not start:\n{self.log()}\n{self.output}")
        self.ws_url = self.url.replace("http://", "ws://") + "/"

    def log(self) -> str:
        """Return what the process wrote on standard error so far."""
        return (self.directory / "gateway.log").read_text(errors="replace")

    @property
    def database_url(self) -> str:
        return self.environment["DATABASE_URL"]

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def stop(self) -> int | None:
        """Ask the process to end, wait for it, and return its exit status."""
        if self.process is None:
            return None
        self.process.terminate()
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def kill(self) -> None:
        """End the process as a crash would: SIGKILL, nothing tidied up."""
        assert self.process
        self.process.kill()
        self.process.wait()

    def manage(
        self, *arguments: str, check: bool = True, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run another command of manage.py on the same database."""
        return subprocess.run(
            [sys.executable, ROOT / "manage.py", *arguments],
            cwd=self.directory,
            env={**self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            check=check,
            timeout=60,
        )

    def events(self) -> int:
        """Return how many events are stored."""
        counting = "from wake.models import SystemEvent; print(SystemEvent.objects.count())"
        return int(self.manage("shell", "-v0", "-c", counting).stdout.split()[-1])

    def _read(self, process: subprocess.Popen[str], ready: threading.Event) -> None:
        assert process.stdout
        shown = {
            "gateway token": "gateway_token",
            "hook token": "hook_token",
            "admin password": "admin_password",
        }
        for line in process.stdout:
            self.output.append(line)
            if match := re.match(r"  (gateway token|hook token|admin password) +(\S+)$", line):
                setattr(self, shown[match[1]], match[2])
            if match := re.match(r"ready (http://\S+)$", line):
                self.url = match[1]
                ready.set()
        ready.set()  # it ended: no need to wait any longer

    def _make_database(self) -> str:
        if not self._postgresql:
            return f"sqlite:///{self.directory / 'live.sqlite3'}"
        self._execute_on_postgresql(f'CREATE DATABASE "{self._database_name}"')
        default = settings.DATABASES["default"]
        user = default["USER"] + (f":{default['PASSWORD']}" if default["PASSWORD"] else "")
        address = f"{default['HOST'] or 'localhost'}:{default['PORT'] or 5432}"
        return f"postgres://{user}@{address}/{self._database_name}"

    def drop_database(self) -> None:
        """Remove the database that was made for this gateway."""
        if self._postgresql and self._owns_database:
            self._execute_on_postgresql(f'DROP DATABASE "{self._database_name}" WITH (FORCE)')

    def _execute_on_postgresql(self, statement: str) -> None:
        import psycopg

        default = settings.DATABASES["default"]
        with psycopg.connect(
            dbname="postgres",
            user=default["USER"] or None,
            password=default["PASSWORD"] or None,
            host=default["HOST"] or None,
            port=default["PORT"] or None,
            autocommit=True,
        ) as admin:
            admin.execute(statement)
