"""A turn as it is written for agents that are reached over a network."""

from __future__ import annotations

from datetime import UTC
from typing import Any

from wake.heartbeats.runners import Turn


def as_json(turn: Turn) -> dict[str, Any]:
    """Return the turn as the object that its agent receives, ready for JSON."""
    return {
        "runId": str(turn.run_id),
        "agentId": turn.agent.id,
        "sessionKey": turn.session_key,
        "reason": turn.reason,
        "attempt": turn.attempt,
        "prompt": turn.prompt,
        "events": [
            {
                "id": str(event.event_id),
                "text": event.text,
                "source": event.source,
                "external": event.external,
                "at": event.at.astimezone(UTC).isoformat().replace("+00:00", "Z"),
            }
            for event in turn.events
        ],
    }
