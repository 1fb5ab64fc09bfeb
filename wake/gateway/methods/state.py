"""How things stand: the gateway, its agents, who is there, and what the last hour was like."""

from __future__ import annotations

from typing import Annotated, Any

from django.utils import timezone
from msgspec import Meta

from wake import activity, configuration, status
from wake.gateway import presence
from wake.gateway.frames import Frame
from wake.gateway.methods.registry import Caller, NoParams, method
from wake.gateway.scopes import READ


@method("health", scope=READ, params=NoParams)
def health(params: NoParams, caller: Caller) -> object:
    """`ok`, `ts`, `durationMs`, `defaultAgentId`, `agents`, `queue` (`queued` events, `due`,
    `running` and `held` sessions, `dead` letters), `heartbeats.enabled`. An agent that nobody
    reaches now has the reason in `unreached`, else null."""
    return status.health()


@method("status", scope=READ, params=NoParams)
def summary(params: NoParams, caller: Caller) -> object:
    """`version`, `uptimeMs`, `sessions.count`, `queue`, `heartbeats.enabled`, `lastHeartbeat`."""
    return status.summary()


@method("system-presence", scope=READ, params=NoParams)
def system_presence(params: NoParams, caller: Caller) -> object:
    """Who gave a sign within five minutes, at most 200: a list of `key`, `host`, `ip`, `version`,
    `mode`, `reason`, `text`, `ts`, and what each said of itself."""
    return presence.entries(timezone.now())


@method("agents.list", scope=READ, params=NoParams)
def list_agents(params: NoParams, caller: Caller) -> object:
    """`defaultId`, `mainKey`, `scope`, and `agents`: `id` and `name` of each that is enabled."""
    snapshot = configuration.gateway()
    return {
        "defaultId": snapshot.default_agent,
        "mainKey": snapshot.main_key,
        "scope": status.wire_scope(snapshot.scope),
        "agents": [
            {"id": agent.id, "name": agent.name or agent.id}
            for agent in snapshot.agents.values()
            if agent.enabled
        ],
    }


class ActivityParams(Frame):
    minutes: Annotated[int, Meta(ge=5, le=activity.MOST_MINUTES)] = 60


@method("activity", scope=READ, params=ActivityParams)
def recent_activity(params: ActivityParams, caller: Caller) -> object:
    """The last minutes, 60 unless said otherwise, the oldest first and the present one last: `ts`
    and `minutes`, each with `ts`, the events `queued`, `delivered` and `dead` in it, the queue's
    `depth` at its end, and `deliveryMs` (`median`, `p95`; or null)."""
    now = timezone.now()
    return {
        "ts": status.milliseconds(now),
        "minutes": [_minute(minute) for minute in activity.last_minutes(params.minutes, now)],
    }


def _minute(minute: activity.Minute) -> dict[str, Any]:
    return {
        "ts": status.milliseconds(minute.start),
        "queued": minute.queued,
        "delivered": minute.delivered,
        "dead": minute.dead,
        "depth": minute.depth,
        "deliveryMs": None
        if minute.median_ms is None
        else {"median": minute.median_ms, "p95": minute.p95_ms},
    }
