"""A gateway of our own to measure: in a process of its own, on a fresh database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.live import LiveGateway

# The policy under which wakes are measured. A session holds as many events as there will be.
POLICY = """
from django.core.management import call_command
call_command("migrate", interactive=False, verbosity=0)
from hooks.models import AllowedSessionPrefix, HookPolicy
from wake.models import Agent, GatewaySettings
policy = HookPolicy.ensure()
policy.allow_request_session_key = True
policy.keep_bodies = "never"
policy.save()
AllowedSessionPrefix.objects.create(prefix="hook:")
settings = GatewaySettings.ensure()
settings.max_queued_events = 100_000_000
settings.save()
agent = Agent.objects.get(pk="main")
agent.heartbeat_every = agent.heartbeat_every * 0
agent.max_runs_per_minute = None
"""
NO_LIMIT = "deliveries without bodies; no limit of queued events, nor of runs a minute"


@contextmanager
def prepared(
    directory: Path, *, agent: str = "", environment: dict[str, str] | None = None
) -> Iterator[LiveGateway]:
    """Give a gateway that is yet to be started, on a migrated database with the policy above.

    `agent` is Python that says more about the `agent` main. SQLite, or the PostgreSQL server that
    DATABASE_URL names, in a database of its own.
    """
    gateway = LiveGateway(directory, environment=environment)
    try:
        gateway.manage("shell", "-v0", "-c", f"{POLICY}\n{agent}\nagent.save()")
        yield gateway
    finally:
        gateway.stop()
        gateway.drop_database()


def by_http(url: str) -> str:
    """Return what makes an agent take its heartbeats at that URL."""
    return (
        "from wake.signing import new_signing_secret\n"
        f"agent.runner, agent.url = 'http', {url!r}\n"
        "agent.signing_secret = new_signing_secret()"
    )


def pid_of(gateway: LiveGateway) -> int:
    assert gateway.process
    return gateway.process.pid


def stored_events(gateway: LiveGateway) -> set[str]:
    """Return the ids of all events in the database."""
    listing = (
        "from wake.models import SystemEvent\n"
        "for uid in SystemEvent.objects.values_list('uid', flat=True).iterator(): print(uid)"
    )
    return set(gateway.manage("shell", "-v0", "-c", listing).stdout.split())
