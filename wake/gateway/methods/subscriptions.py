"""What a connection is told of by itself: changes of sessions, and what happens in one of them."""

from __future__ import annotations

from typing import Final

from wake import configuration
from wake.dispatch import session_to_read
from wake.errors import Refused
from wake.gateway.frames import Frame, NonEmpty
from wake.gateway.methods.registry import Caller, NoParams, method
from wake.gateway.scopes import READ

MAX_FOLLOWED: Final = 200


@method("sessions.subscribe", scope=READ, params=NoParams)
def subscribe(params: NoParams, caller: Caller) -> object:
    """`sessions.changed` from now on. `subscribed`."""
    caller.subscriptions.sessions = True
    return {"subscribed": True}


@method("sessions.unsubscribe", scope=READ, params=NoParams)
def unsubscribe(params: NoParams, caller: Caller) -> object:
    """No more `sessions.changed`. `subscribed`."""
    caller.subscriptions.sessions = False
    return {"subscribed": False}


class OneSessionParams(Frame):
    key: NonEmpty
    agent_id: str = ""


@method("sessions.messages.subscribe", scope=READ, params=OneSessionParams)
def follow(params: OneSessionParams, caller: Caller) -> object:
    """`session.message` of this session from now on; at most 200 sessions. `subscribed`, `key`,
    `agentId`."""
    session = session_to_read(params.key, params.agent_id, configuration.gateway())
    followed = caller.subscriptions.messages
    if session not in followed and len(followed) >= MAX_FOLLOWED:
        raise Refused(f"a connection follows at most {MAX_FOLLOWED} sessions")
    followed.add(session)
    return {"subscribed": True, "key": session.key, "agentId": session.agent_id}


@method("sessions.messages.unsubscribe", scope=READ, params=OneSessionParams)
def unfollow(params: OneSessionParams, caller: Caller) -> object:
    """No more `session.message` of this session. `subscribed`, `key`, `agentId`."""
    session = session_to_read(params.key, params.agent_id, configuration.gateway())
    caller.subscriptions.messages.discard(session)
    return {"subscribed": False, "key": session.key, "agentId": session.agent_id}
