"""What a method is: one function with its scope and its params beside it.

A method takes its decoded params and the connection's caller, and returns the payload of its
response. It raises errors of `wake.errors`; `to_error` translates them. A plain function runs on a
database thread; a coroutine function runs on the connection's event loop, never waits for the
database there (`caller.link.in_database` does), and may send events to the connection.
To add a method, write it in one of the files beside this one: `hello-ok` and docs/protocol.md list
whatever is declared.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, ParamSpec, Protocol, TypeVar

from django.db import DatabaseError

from wake.errors import LeaseLost, QueueFull, Refused, StorageUnavailable
from wake.gateway import scopes
from wake.gateway.credentials import Credential
from wake.gateway.frames import Error, Frame, InvalidFrame, Request, decode_params
from wake.session_keys import SessionKey

logger = logging.getLogger(__name__)

A = ParamSpec("A")
R = TypeVar("R")


@dataclass(slots=True)
class Subscriptions:
    """What a connection asked to be told; changed by its requests, read by the hub."""

    sessions: bool = False
    messages: set[SessionKey] = field(default_factory=set)


class Link(Protocol):
    """The connection of a caller, for methods that run on its event loop."""

    def tell(self, event: str, payload: object) -> None:
        """Send an event to this connection alone."""

    async def in_database(
        self, function: Callable[A, R], /, *args: A.args, **kwargs: A.kwargs
    ) -> R:
        """Call a function that uses the database, on one of the threads this connection may use."""
        ...


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: a connection after its handshake."""

    connection_id: str
    credential: Credential
    scopes: tuple[str, ...]
    link: Link
    subscriptions: Subscriptions = field(default_factory=Subscriptions)


class NoParams(Frame):
    """For a method that takes none; what is sent is passed over."""


P = TypeVar("P", bound=Frame)
Function = Callable[[P, Caller], object]


@dataclass(frozen=True, slots=True)
class Method:
    """One method of the protocol: what it takes, and the scope that it needs.

    One `for_agents` opens to a token that is bound to an agent as well, whatever its scopes; it
    sees to it itself that this is the token's agent.
    """

    name: str
    scope: str
    params: type[Frame]
    function: Callable[[Any, Caller], object]
    for_agents: bool = False

    @property
    def is_on_loop(self) -> bool:
        """Whether it runs on the event loop; then what `call` returns is to be awaited."""
        return inspect.iscoroutinefunction(self.function)


METHODS: Final[dict[str, Method]] = {}


def method(
    name: str, *, scope: str, params: type[P], for_agents: bool = False
) -> Callable[[Function[P]], Function[P]]:
    """Declare a method under its name on the wire."""

    def declare(function: Function[P]) -> Function[P]:
        METHODS[name] = Method(name, scope, params, function, for_agents)
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
    is_agents = wanted.for_agents and bool(caller.credential.agent_id)
    if not is_agents and not scopes.includes(caller.scopes, wanted.scope):
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
    if isinstance(error, LeaseLost):
        return Error(code="INVALID_REQUEST", message=str(error), details={"code": "LEASE_LOST"})
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
