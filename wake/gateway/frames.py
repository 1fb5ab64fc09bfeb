"""The gateway protocol's frames, as they are on the wire; the file reads like its page.

Text frames, one JSON object each. Field names are camelCase on the wire. What a client sends is
decoded strictly (no guessing of types), but unknown fields are passed over, so that newer clients
are understood.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType
from msgspec import inspect as types

OLDEST_PROTOCOL: Final = 3
NEWEST_PROTOCOL: Final = 4

# Sizes in bytes of the UTF-8 text of a frame.
MAX_HANDSHAKE_BYTES: Final = 64 * 1024
MAX_PAYLOAD_BYTES: Final = 25 * 1024 * 1024
MAX_BUFFERED_BYTES: Final = 50 * 1024 * 1024
TICK_SECONDS: Final = 30.0
HANDSHAKE_SECONDS: Final = 15.0

# What the gateway tells by itself: to whom and when, and the payload.
EVENTS: Final = {
    "connect.challenge": (
        "everyone, first of all",
        "`nonce`, which a device signs, and `ts`",
    ),
    "tick": ("everyone, every `tickIntervalMs`", "`ts`"),
    "presence": (
        "who may read, when somebody comes, goes or changes, and every minute",
        "`presence`: the list that `system-presence` answers",
    ),
    "health": (
        "who may read, when the queue or the agents change, and every minute",
        "what `health` answers",
    ),
    "heartbeat": (
        "who may read, at the start and at the end of every run",
        "`runId`, `sessionKey`, `agentId`, `status` (`running` at the start), `reason`, `attempt`, "
        "`eventCount`, `durationMs` and `preview` (null and empty at the start), `ts`",
    ),
    "heartbeat.run": (
        "one client of the agent, attached with `agent.attach`, when it is to run a heartbeat",
        "`runId`, `agentId`, `sessionKey`, `reason`, `attempt`, `prompt` and `events`, as the "
        "`http` runner posts them; `deadlineMs`, how long the client's lease lasts from now; "
        "`timeoutMs`, how long the heartbeat may take in all",
    ),
    "heartbeat.lost": (
        "the client that has a run, when it is not its own any more",
        "`runId`, `reason`",
    ),
    "sessions.changed": (
        "who asked for it with `sessions.subscribe`",
        "`sessionKey`, `agentId`, `reason` (`event`, `heartbeat` or `changed`), `ts`, and "
        "`session` as in `sessions.list`; or `reason` `many` and `ts` alone: list again",
    ),
    "session.message": (
        "who follows the session with `sessions.messages.subscribe`",
        "`sessionKey`, `agentId`, and `item`: an event or a heartbeat as in `sessions.history`",
    ),
    "shutdown": ("everyone, before the gateway stops", "`reason`"),
}

NonEmpty = Annotated[str, Meta(min_length=1)]


class Frame(msgspec.Struct, rename="camel", kw_only=True):
    """Anything on the wire: snake_case here, camelCase there."""


# --- Requests, responses, events ------------------------------------------------------------------


class Request(Frame, tag_field="type", tag="req"):
    """What a client asks: `params` are decoded by the method."""

    id: NonEmpty
    method: NonEmpty
    params: Raw = Raw(b"{}")


class Error(Frame, omit_defaults=True):
    """Why a request failed. `retryable`: the same request may succeed after `retry_after_ms`."""

    code: Literal["INVALID_REQUEST", "FORBIDDEN", "UNAVAILABLE"]
    message: str
    details: dict[str, Any] | None = None
    retryable: bool = False
    retry_after_ms: int | None = None


class Response(Frame, tag_field="type", tag="res"):
    """The answer to the request of the same id: a payload or an error."""

    id: str
    ok: bool
    payload: Any = UNSET
    error: Error | UnsetType = UNSET


class Event(Frame, tag_field="type", tag="event"):
    """What the gateway tells by itself; `seq` counts up by one on each connection."""

    event: str
    payload: Any
    seq: int


# --- The handshake: connect, hello-ok -------------------------------------------------------------


class Client(Frame):
    """The program that connects. Any non-empty id is welcome."""

    id: NonEmpty
    version: str
    platform: str
    mode: NonEmpty
    device_family: str | None = None
    instance_id: str | None = None


class Credentials(Frame):
    """A gateway token, in either field."""

    token: str | None = None
    password: str | None = None


class Device(Frame):
    """A device's proof of its key; see `device_proof`."""

    id: str
    public_key: str
    signature: str
    signed_at: int
    nonce: str


class ConnectParams(Frame):
    """The first request of every connection. An absent or empty list of scopes asks for all."""

    min_protocol: int
    max_protocol: int
    client: Client
    auth: Credentials | None = None
    device: Device | None = None
    role: Literal["operator"] = "operator"
    scopes: list[str] = []


class Server(Frame):
    version: str
    conn_id: str


class Features(Frame):
    methods: Sequence[str]
    events: Sequence[str]


class SessionDefaults(Frame):
    default_agent_id: str
    main_key: str
    main_session_key: str
    scope: str


class StateVersion(Frame):
    """Numbers that grow with every change of what they count."""

    presence: int
    health: int


class Snapshot(Frame):
    presence: Sequence[dict[str, Any]]
    health: dict[str, Any]
    state_version: StateVersion
    uptime_ms: int
    session_defaults: SessionDefaults


class Granted(Frame):
    """What a connection may do, and the name of the credential: `user NAME` for a person."""

    role: str
    scopes: Sequence[str]
    name: str


class Policy(Frame):
    max_payload: int = MAX_PAYLOAD_BYTES
    max_buffered_bytes: int = MAX_BUFFERED_BYTES
    tick_interval_ms: int = int(TICK_SECONDS * 1000)


class HelloOk(Frame, tag_field="type", tag="hello-ok"):
    """The payload that answers `connect`: from here on requests are taken."""

    protocol: int
    server: Server
    features: Features
    snapshot: Snapshot
    auth: Granted
    policy: Policy


# --- Reading and writing --------------------------------------------------------------------------

S = TypeVar("S", bound=msgspec.Struct)

UNKNOWN_ID: Final = "invalid"


class InvalidFrame(Exception):
    """A frame or its params are not what they must be; the text names the field.

    `id` is the request's own where the frame has one, else "invalid".
    """

    def __init__(self, problem: str, request_id: str = UNKNOWN_ID) -> None:
        super().__init__(problem)
        self.id = request_id


class NotJson(InvalidFrame):
    """A frame that is no JSON at all."""


def encode(frame: Frame) -> str:
    """Return a frame as it is sent."""
    return msgspec.json.encode(frame).decode()


_requests = msgspec.json.Decoder(Request)


def decode_request(data: bytes) -> Request:
    """Return the request that a text frame holds. Raises InvalidFrame, NotJson."""
    try:
        return _requests.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        problem = describe(error, Request)
        if isinstance(error, msgspec.ValidationError):
            raise InvalidFrame(problem, _request_id(data)) from None
        raise NotJson(problem) from None


class _Identified(msgspec.Struct):
    id: str = UNKNOWN_ID


def _request_id(data: bytes) -> str:
    try:
        return msgspec.json.decode(data, type=_Identified).id
    except (msgspec.DecodeError, RecursionError):
        return UNKNOWN_ID


def decode_params(params: Raw, expected: type[S]) -> S:
    """Return a request's params. Raises InvalidFrame, naming the field."""
    try:
        return msgspec.json.decode(params, type=expected)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidFrame(describe(error, expected)) from None


# --- Naming what is wrong -------------------------------------------------------------------------

_MISSING = re.compile(r"missing required field `(?P<field>[^`]+)`")
_AT = re.compile(r" - at `\$\.?(?P<path>[^`]*)`\Z")
_STEP = re.compile(r"(?P<field>\w+)|\[[^]]*\]")


def describe(error: msgspec.DecodeError | RecursionError, expected: type[msgspec.Struct]) -> str:
    """Return what is wrong in the client's words, for example `enabled (boolean) required`."""
    if not isinstance(error, msgspec.ValidationError):
        return "nested too deep" if isinstance(error, RecursionError) else "not valid JSON"
    message = str(error)
    at = _AT.search(message)
    missing = _MISSING.search(message)
    path = ".".join(part for part in (at and at["path"], missing and missing["field"]) if part)
    if not path:
        return "must be an object"
    is_required, words = expectation(expected, path)
    return f"{path} ({words}) required" if is_required else f"{path} must be: {words}"


@lru_cache(maxsize=256)
def expectation(expected: type[msgspec.Struct], path: str) -> tuple[bool, str]:
    """Return whether the field at `path` is required, and what it must be, in words."""
    found: types.Type = types.type_info(expected)
    is_required = False
    for step in _STEP.finditer(path):
        found = _present(found)
        if isinstance(found, types.StructType):
            if step["field"] == found.tag_field:
                return True, f'"{found.tag}"'
            field = next(field for field in found.fields if field.encode_name == step["field"])
            found, is_required = field.type, field.required
        elif isinstance(found, types.ListType):
            found, is_required = found.item_type, False
    return is_required, _words(_present(found))


def _present(found: types.Type) -> types.Type:
    """Return what a field holds when it is there and not null."""
    if isinstance(found, types.Metadata):
        return _present(found.type)
    if isinstance(found, types.UnionType):
        return next(kind for kind in found.types if not isinstance(kind, types.NoneType))
    return found


def _words(found: types.Type) -> str:
    if isinstance(found, types.StrType):
        limit = f" of at most {found.max_length} characters" if found.max_length else ""
        without_nul = " without NUL" if found.pattern else ""
        return f"{'non-empty ' if found.min_length else ''}string{limit}{without_nul}"
    if isinstance(found, types.EnumType):
        return " or ".join(f'"{member.value}"' for member in found.cls)
    if isinstance(found, types.LiteralType):
        return " or ".join(f'"{value}"' for value in found.values)
    if isinstance(found, types.ListType):
        limit = f"at most {found.max_length} " if found.max_length else ""
        return f"array of {limit}strings"
    if isinstance(found, types.IntType) and found.ge is not None:
        return f"integer from {found.ge} to {found.le}" if found.le else f"integer from {found.ge}"
    return {
        types.BoolType: "boolean",
        types.IntType: "integer",
        types.FloatType: "number",
    }.get(type(found), "object")
