"""What each heartbeat process says of how it reaches agents, for those who look on from others."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from django.db import transaction

from wake import configuration, doorbell
from wake.configuration import Reach
from wake.models import Agent, AgentReach


def note(owner: str, reached: Mapping[str, Reach], now: datetime) -> None:
    """Store how the process `owner` reaches its agents, by agent id, in place of what it said.

    What processes that are gone said goes too. Raises DatabaseError.
    """
    with transaction.atomic():
        AgentReach.objects.filter(owner=owner).exclude(agent__in=reached).delete()
        AgentReach.objects.filter(seen_at__lt=now - configuration.REACH_COUNTS_FOR).delete()
        # One that was deleted in between is told of by nobody.
        known = Agent.objects.filter(pk__in=reached).values_list("pk", flat=True)
        AgentReach.objects.bulk_create(
            [
                AgentReach(
                    agent_id=agent_id,
                    owner=owner,
                    clients=reached[agent_id].clients,
                    capacity=reached[agent_id].capacity,
                    problem=reached[agent_id].problem,
                    seen_at=now,
                )
                for agent_id in known
            ],
            update_conflicts=True,
            unique_fields=["agent", "owner"],
            update_fields=["clients", "capacity", "problem", "seen_at"],
        )
        doorbell.ring()
