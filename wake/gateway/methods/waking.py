"""Waking sessions, and what nodes say of themselves."""

from __future__ import annotations

from typing import Annotated, Final

from django.db import transaction
from django.utils import timezone
from msgspec import Meta

from wake.dispatch import (
    Mode,
    WakeRequest,
    clean_text,
    dispatch,
    for_system_event,
    is_presence_line,
    parse_run_id,
)
from wake.gateway import presence
from wake.gateway.frames import Frame, NonEmpty
from wake.gateway.methods.registry import Caller, method
from wake.gateway.scopes import ADMIN, WRITE

SOURCE: Final = "ws"


class WakeParams(Frame):
    mode: Mode
    text: str
    session_key: NonEmpty = ""
    agent_id: str = ""
    run_id: str = ""


@method("wake", scope=WRITE, params=WakeParams)
def wake(params: WakeParams, caller: Caller) -> object:
    """The receipt: `ok`, `mode`, `eventOutcome`, `sessionKey`, `eventId`. A blank text answers
    `{"ok":false,"error":"text required"}`; a key of blanks is no key. An agent that sends from
    within a run names it in `runId`."""
    if not params.text.strip():
        return {"ok": False, "error": "text required"}
    return dispatch(
        WakeRequest(
            params.text,
            SOURCE,
            params.mode,
            params.session_key,
            params.agent_id,
            by_person=bool(caller.credential.session_key),
            run_id=parse_run_id(params.run_id),
        )
    ).as_json()


# What the database keeps of a node's words: PostgreSQL stores no NUL.
_Word = Annotated[str, Meta(max_length=100, pattern=r"\A[^\0]*\Z")]
_Words = Annotated[list[_Word], Meta(max_length=64)]


class SystemEventParams(Frame):
    text: str
    session_key: str | None = None
    reason: _Word | None = None
    device_id: _Word | None = None
    instance_id: _Word | None = None
    host: _Word | None = None
    ip: _Word | None = None
    mode: _Word | None = None
    version: _Word | None = None
    platform: _Word | None = None
    device_family: _Word | None = None
    model_identifier: _Word | None = None
    last_input_seconds: float | None = None
    roles: _Words | None = None
    scopes: _Words | None = None
    tags: _Words | None = None


@method("system-event", scope=ADMIN, params=SystemEventParams)
def system_event(params: SystemEventParams, caller: Caller) -> object:
    """`ok`, `presence` (whether a node was recorded) and, if an event was queued, the receipt. A
    text that begins with `Node:` is queued only when it is news."""
    text = clean_text(params.text)
    is_line = is_presence_line(text)
    report = _report(text, params, presence.parse_line(text) if is_line else {})
    payload: dict[str, object] = {"ok": True, "presence": bool(report.key)}
    # Together: news that could not be queued must be news again at the next try.
    with transaction.atomic():
        is_news = presence.record(report, timezone.now()) if report.key else True
        if is_news or not is_line:
            receipt = dispatch(for_system_event(text, params.session_key, source=SOURCE))
            payload |= receipt.as_json()
    return payload


def _report(text: str, params: SystemEventParams, said: dict[str, str]) -> presence.Report:
    details = {
        "deviceId": params.device_id,
        "instanceId": params.instance_id,
        "platform": params.platform,
        "deviceFamily": params.device_family,
        "modelIdentifier": params.model_identifier,
        "lastInputSeconds": params.last_input_seconds,
        "roles": params.roles,
        "scopes": params.scopes,
        "tags": params.tags,
    }
    return presence.Report(
        text=text,
        device_id=params.device_id or "",
        instance_id=params.instance_id or "",
        host=params.host or said.get("host", ""),
        ip=params.ip or said.get("ip", ""),
        version=params.version or said.get("version", ""),
        mode=params.mode or said.get("mode", ""),
        reason=params.reason or said.get("reason", ""),
        details={name: value for name, value in details.items() if value is not None},
    )
