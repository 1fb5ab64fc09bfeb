"""Heartbeats: the last one, any one, and whether any run."""

from __future__ import annotations

import logging
from uuid import UUID

from django.utils import timezone

from wake import status
from wake.errors import Refused
from wake.gateway import records
from wake.gateway.frames import Frame, NonEmpty
from wake.gateway.methods.registry import Caller, NoParams, method
from wake.gateway.scopes import ADMIN, READ
from wake.models import GatewaySettings, Heartbeat

logger = logging.getLogger(__name__)


@method("last-heartbeat", scope=READ, params=NoParams)
def last_heartbeat(params: NoParams, caller: Caller) -> object:
    """The newest run that has ended: `ts`, `status`, `reason`, `preview`, `durationMs`,
    `sessionKey`; or null."""
    return status.last_heartbeat()


class GetParams(Frame):
    run_id: NonEmpty


@method("heartbeats.get", scope=READ, params=GetParams)
def get_heartbeat(params: GetParams, caller: Caller) -> object:
    """One run whole: the item of `sessions.history` with all of `reply`, and `prompt`,
    `sessionKey`, `agentId`."""
    try:
        run_id = UUID(params.run_id)
    except ValueError:
        run_id = None
    run = run_id and Heartbeat.objects.select_related("session").filter(run_id=run_id).first()
    if not run:
        raise Refused(f"unknown run: {params.run_id[:100]}")
    return records.whole_heartbeat(run)


class SetHeartbeatsParams(Frame):
    enabled: bool


@method("set-heartbeats", scope=ADMIN, params=SetHeartbeatsParams)
def set_heartbeats(params: SetHeartbeatsParams, caller: Caller) -> object:
    """All heartbeats on, or off: then events wait. `ok`, `enabled`, `ts`."""
    stored = GatewaySettings.ensure()
    stored.heartbeats_enabled = params.enabled
    stored.save(update_fields=["heartbeats_enabled"])
    logger.info(
        "gateway: %s turned heartbeats %s",
        caller.credential.name,
        "on" if params.enabled else "off",
    )
    return {"ok": True, "enabled": params.enabled, "ts": status.milliseconds(timezone.now())}
