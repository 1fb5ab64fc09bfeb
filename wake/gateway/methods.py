"""The gateway's methods. Each is one function with its scope and its params beside it.

A method runs on a database thread, takes its decoded params and the connection's caller, and
returns the payload of its response. It raises errors of `wake.errors`; `to_error` translates them.
To add a method, write it here: `hello-ok` lists whatever is declared.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeVar

from django.db import DatabaseError, transaction
from django.utils import timezone
from msgspec import Meta

from wake import configuration, status
from wake.dispatch import (
    Mode,
    WakeRequest,
    clean_text,
    dispatch,
    for_system_event,
    is_presence_line,
)
from wake.errors import QueueFull, Refused, StorageUnavailable
from wake.gateway import presence, scopes
from wake.gateway.frames import Error, Frame, InvalidFrame, NonEmpty, Request, decode_params
from wake.gateway.handshake import Credential
from wake.gateway.scopes import ADMIN, READ, WRITE
from wake.models import GatewaySettings

logger = logging.getLogger(__name__)

SOURCE: Final = "ws"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: a connection after its handshake."""

    connection_id: str
    credential: Credential
    scopes: tuple[str, ...]


P = TypeVar("P", bound=Frame)
Function = Callable[[P, Caller], object]


@dataclass(frozen=True, slots=True)
class Method:
    """One method of the protocol: what it takes, and the scope that it needs."""

    name: str
    scope: str
    params: type[Frame]
    function: Callable[[Any, Caller], object]


METHODS: Final[dict[str, Method]] = {}


def method(name: str, *, scope: str, params: type[P]) -> Callable[[Function[P]], Function[P]]:
    """Declare a method under its name on the wire."""

    def declare(function: Function[P]) -> Function[P]:
        METHODS[name] = Method(name, scope, params, function)
        return function

    return declare


class MethodRefused(Exception):
    """A request that no method is called for."""

    def __init__(self, error: Error) -> None:
        super().__init__(error.message)
        self.error = error


def call(request: Request, caller: Caller) -> object:
    """Return the payload that answers a request.

    Raises MethodRefused (unknown method, missing scope, bad params) and what the method raises.
    """
    wanted = METHODS.get(request.method)
    if wanted is None:
        raise _invalid(f"unknown method: {request.method[:100]}")
    if not scopes.includes(caller.scopes, wanted.scope):
        raise MethodRefused(
            Error(
                code="FORBIDDEN",
                message=f"missing scope: {wanted.scope}",
                details={
                    "code": "MISSING_SCOPE",
                    "missingScope": wanted.scope,
                    "requiredScopes": [wanted.scope],
                },
            )
        )
    try:
        params = decode_params(request.params, wanted.params)
    except InvalidFrame as error:
        raise _invalid(f"invalid {wanted.name} params: {error}") from None
    return wanted.function(params, caller)


def _invalid(message: str) -> MethodRefused:
    return MethodRefused(Error(code="INVALID_REQUEST", message=message))


def to_error(error: Exception) -> Error:
    """Translate what `call` raises, by class. Details of a defect go to the log, never outside."""
    if isinstance(error, MethodRefused):
        return error.error
    if isinstance(error, Refused):
        return Error(code="INVALID_REQUEST", message=str(error))
    if isinstance(error, QueueFull | StorageUnavailable):
        return _unavailable(str(error), error.retry_after_seconds)
    if isinstance(error, DatabaseError):
        logger.warning("gateway: the database failed: %s", error)
        return _unavailable(
            "the database is not available now; try again", StorageUnavailable.retry_after_seconds
        )
    logger.error("gateway: defect in a method", exc_info=error)
    return Error(code="UNAVAILABLE", message="internal error; the gateway's log has more")


def _unavailable(message: str, retry_after_seconds: float) -> Error:
    return Error(
        code="UNAVAILABLE",
        message=message,
        retryable=True,
        retry_after_ms=int(retry_after_seconds * 1000),
    )


TOO_MANY_REQUESTS: Final = _unavailable("too many requests in flight on this connection", 1)


# --- Waking ---------------------------------------------------------------------------------------


class NoParams(Frame):
    """For a method that takes none; what is sent is passed over."""


class WakeParams(Frame):
    mode: Mode
    text: str
    session_key: NonEmpty = ""
    agent_id: str = ""


@method("wake", scope=WRITE, params=WakeParams)
def wake(params: WakeParams, caller: Caller) -> object:
    if not params.text.strip():
        return {"ok": False, "error": "text required"}
    return dispatch(
        WakeRequest(params.text, SOURCE, params.mode, params.session_key, params.agent_id)
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


# --- Heartbeats -----------------------------------------------------------------------------------


@method("last-heartbeat", scope=READ, params=NoParams)
def last_heartbeat(params: NoParams, caller: Caller) -> object:
    return status.last_heartbeat()


class SetHeartbeatsParams(Frame):
    enabled: bool


@method("set-heartbeats", scope=ADMIN, params=SetHeartbeatsParams)
def set_heartbeats(params: SetHeartbeatsParams, caller: Caller) -> object:
    stored = GatewaySettings.ensure()
    stored.heartbeats_enabled = params.enabled
    stored.save(update_fields=["heartbeats_enabled"])
    logger.info(
        "gateway: %s turned heartbeats %s",
        caller.credential.name,
        "on" if params.enabled else "off",
    )
    return {"ok": True, "enabled": params.enabled}


# --- How things stand -----------------------------------------------------------------------------


@method("health", scope=READ, params=NoParams)
def health(params: NoParams, caller: Caller) -> object:
    return status.health()


@method("status", scope=READ, params=NoParams)
def summary(params: NoParams, caller: Caller) -> object:
    return status.summary()


@method("system-presence", scope=READ, params=NoParams)
def system_presence(params: NoParams, caller: Caller) -> object:
    return presence.entries()


@method("agents.list", scope=READ, params=NoParams)
def list_agents(params: NoParams, caller: Caller) -> object:
    snapshot = configuration.gateway()
    return {
        "defaultId": snapshot.default_agent,
        "mainKey": snapshot.main_key,
        "scope": wire_scope(snapshot.scope),
        "agents": [
            {"id": agent.id, "name": agent.name or agent.id}
            for agent in snapshot.agents.values()
            if agent.enabled
        ],
    }


def wire_scope(scope: str) -> str:
    """Return a session scope under the protocol's name for it."""
    return "per-sender" if scope == "per-agent" else scope
