"""`manage.py gateway`: migrate, make what the first start needs, and serve."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import secrets
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, Final

import uvicorn
from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError, connection, transaction
from uvicorn.supervisors import Multiprocess

from hooks import tokens as hook_tokens
from hooks.models import HookPolicy, HookToken
from wake import cores, listening, status, tokens
from wake.gateway.frames import MAX_HANDSHAKE_BYTES
from wake.lifespan import HEARTBEATS_VARIABLE
from wake.limits import raise_open_files_limit
from wake.models import GatewaySettings, GatewayToken

GRACE_SECONDS: Final = 10
PROBE_SECONDS: Final = 0.05
_MIGRATION_LOCK: Final = 0x6F70_636C  # any number that nothing else in the database locks


class Command(BaseCommand):
    help = "Migrate, make the default agent, serve HTTP and WebSocket, and run heartbeats."
    requires_migrations_checks = False

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
        parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one")
        parser.add_argument(
            "--workers",
            type=int,
            default=1,
            help="server processes; more than one needs PostgreSQL and Redis",
        )
        parser.add_argument(
            "--no-heartbeats",
            action="store_true",
            help="serve only; `manage.py heartbeats` runs the heartbeats elsewhere, except those "
            "of the clients that are connected here (runner inbox)",
        )

    def handle(self, *, host: str, port: int, workers: int, no_heartbeats: bool, **_: Any) -> None:
        _check_workers(workers)
        # The port first: a second start by mistake ends here and touches nothing.
        taken = _listen(host, port, workers)
        try:
            with _one_at_a_time():
                _migrate()
                self._show_once(_first_run())
        except (DatabaseError, OSError) as error:
            raise CommandError(f"cannot use the database: {error}") from error
        connection.close()

        os.environ[HEARTBEATS_VARIABLE] = "0" if no_heartbeats else "1"
        _keep_to_one_core(workers)
        _allow_host(host)
        raise_open_files_limit()
        url = _url(host, taken.getsockname()[1])
        threading.Thread(target=self._announce, args=(url,), daemon=True).start()
        _serve(taken, workers)

    def _show_once(self, made: dict[str, str]) -> None:
        if not made:
            return
        self.stdout.write("\nFirst start. These are shown only this once:")
        for name, value in made.items():
            self.stdout.write(f"  {name:<16}{value}")
        self.stdout.write("")

    def _announce(self, url: str) -> None:
        """Print the ready line once the server answers."""
        while not _answers(_probe_url(url)):
            time.sleep(PROBE_SECONDS)
        self.stdout.write(f"ready {url}")
        self.stdout.flush()


def _check_workers(workers: int) -> None:
    if workers < 1:
        raise CommandError("--workers takes a number from 1 up")
    if workers == 1:
        return
    if connection.vendor != "postgresql":
        raise CommandError("more than one worker needs PostgreSQL: set DATABASE_URL")
    if not settings.REDIS_URL:
        raise CommandError("more than one worker needs Redis: set REDIS_URL")


def _listen(host: str, port: int, workers: int) -> socket.socket:
    if not 0 <= port <= 65_535:
        raise CommandError(f"--port takes a number from 0 to 65535, not {port}")
    try:
        return listening.listen(host, port, workers)
    except (OSError, OverflowError) as error:
        raise CommandError(f"cannot listen on {host} port {port}: {error}") from error


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Let one gateway at a time prepare the database that several share."""
    if connection.vendor == "sqlite":
        path = connection.settings_dict["NAME"]
        with open(f"{path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Events are private: the file is made for its owner alone, and what SQLite puts beside
            # it is made like it.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            yield
        return
    with connection.cursor() as cursor:
        cursor.execute("SET lock_timeout = 0")
        cursor.execute("SELECT pg_advisory_lock(%s)", [_MIGRATION_LOCK])
        try:
            yield
        finally:
            cursor.execute("SELECT pg_advisory_unlock(%s)", [_MIGRATION_LOCK])


def _migrate() -> None:
    """Migrate where it is needed, and have the rows that are always there.

    `migrate` itself takes its time even when there is nothing to do. It makes those rows too, but a
    process that is killed may leave the tables without them.
    """
    if not status.is_migrated():
        call_command("migrate", interactive=False, verbosity=0)
    GatewaySettings.ensure()
    HookPolicy.ensure()


@transaction.atomic
def _first_run() -> dict[str, str]:
    """Make the first user and the first tokens where there are none; return them by name."""
    made: dict[str, str] = {}
    users = get_user_model().objects
    if not users.exists():
        password = secrets.token_urlsafe(12)
        users.create_superuser("admin", password=password)
        made |= {"admin user": "admin", "admin password": password}
    if not settings.OPENCLAW_GATEWAY_TOKEN and not GatewayToken.objects.exists():
        _, made["gateway token"] = tokens.create_for_gateway("first start")
    if not settings.OPENCLAW_HOOKS_TOKEN and not HookToken.objects.exists():
        _, made["hook token"] = hook_tokens.create("first start")
    return made


def _allow_host(host: str) -> None:
    """Let requests name the address that the operator chose to listen on."""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_unspecified:
            return
    name = f"[{host}]" if ":" in host else host
    settings.ALLOWED_HOSTS = [*settings.ALLOWED_HOSTS, name]
    # Worker processes read the settings anew.
    os.environ["ALLOWED_HOSTS"] = ",".join(settings.ALLOWED_HOSTS)


def _keep_to_one_core(workers: int) -> None:
    """Have each server process keep to a core of its own, unless the operator says otherwise.

    Not where all cores would be taken: the others are for the database, and all else that is here.
    """
    if settings.OPENCLAW_ONE_CORE is None:
        settings.OPENCLAW_ONE_CORE = cores.are_there_more_than(workers)
        # Worker processes read the settings anew.
        os.environ["OPENCLAW_ONE_CORE"] = str(settings.OPENCLAW_ONE_CORE)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _probe_url(url: str) -> str:
    # Not a page: one that nobody has opened yet takes its time.
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:") + "/healthz"


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=60).close()  # noqa: S310 - our own URL
    except urllib.error.HTTPError:  # any answer is an answer
        return True
    except (urllib.error.URLError, ConnectionError):  # no worker listens yet
        return False
    return True


def _serve(taken: socket.socket, workers: int) -> None:
    config = uvicorn.Config(
        "openclaw_site.asgi:application",
        workers=workers,
        http="wake.http_protocol:BoundedHeadProtocol",
        ws="wake.websocket_protocol:GatewayWebSocketProtocol",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.TRUSTED_PROXIES),
        forwarded_allow_ips=settings.TRUSTED_PROXIES,
        # Until a client is known; the connection raises it then.
        ws_max_size=MAX_HANDSHAKE_BYTES,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    if workers > 1:
        Multiprocess(config, sockets=[taken]).run()
        return
    server = uvicorn.Server(config)
    # Having tidied up, the server raises the signal that ended it once more: that is a good end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    server.run(sockets=[taken])
    if not server.started:
        raise CommandError("the server did not start; the reason is in the log above")
