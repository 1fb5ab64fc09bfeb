"""The gateway's methods, by what they are about; importing this package declares them all."""

from wake.gateway.methods import heartbeats, inbox, sessions, state, subscriptions, waking
from wake.gateway.methods.registry import (
    METHODS,
    TOO_MANY_REQUESTS,
    Caller,
    Method,
    NoParams,
    call,
    to_error,
)

__all__ = [
    "METHODS",
    "TOO_MANY_REQUESTS",
    "Caller",
    "Method",
    "NoParams",
    "call",
    "heartbeats",
    "inbox",
    "sessions",
    "state",
    "subscriptions",
    "to_error",
    "waking",
]
