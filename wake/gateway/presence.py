"""Presence: what nodes last said of themselves, shared by all processes through the database."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from django.db import transaction

from wake.models import PresenceEntry
from wake.status import milliseconds

# A node that says it is still there, without news.
PERIODIC_REASONS: Final = frozenset({"periodic", "heartbeat"})
MAX_ENTRIES: Final = 200

_HEAD = re.compile(r"\s*Node:\s*(?P<host>[^(]*?)\s*(?:\((?P<ip>[^)]*)\))?\s*\Z", re.DOTALL)
_WORD_AND_VALUE = re.compile(r"\s*(?P<word>app|mode|reason)\s+(?P<value>.*?)\s*\Z", re.DOTALL)
_FIELD_OF_WORD: Final = {"app": "version", "mode": "mode", "reason": "reason"}


@dataclass(frozen=True, slots=True)
class Report:
    """One report of a node. An empty field says nothing, and leaves what is stored."""

    text: str
    device_id: str = ""
    instance_id: str = ""
    host: str = ""
    ip: str = ""
    version: str = ""
    mode: str = ""
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The node's own id: its device, else its instance, else its host; "" for none."""
        return (self.device_id or self.instance_id or self.host).strip().lower()

    def told(self) -> dict[str, str]:
        """Return the fields that the report says something about."""
        fields = {name: getattr(self, name) for name in ("host", "ip", "version", "mode", "reason")}
        return {name: value for name, value in fields.items() if value}


def parse_line(text: str) -> dict[str, str]:
    """Return what a presence line says of its node.

    Such as `Node: desk (10.0.0.2) · app 1.2 · last input 5s ago · mode local · reason launch`.
    Parts that are not understood are passed over; each value is cut to what can be stored.
    """
    head, *parts = text.split("·")
    found: dict[str, str] = {}
    if match := _HEAD.match(head):
        found |= {name: value.strip() for name, value in match.groupdict("").items()}
    for part in parts:
        if match := _WORD_AND_VALUE.match(part):
            found[_FIELD_OF_WORD[match["word"]]] = match["value"]
    return {name: value[:100] for name, value in found.items() if value}


def is_news(stored: dict[str, str], told: dict[str, str]) -> bool:
    """Whether a report says something new: host, ip, version, mode, or a non-periodic reason."""
    return any(
        value != stored.get(name, "")
        for name, value in told.items()
        if name != "reason" or value.lower() not in PERIODIC_REASONS
    )


def record(report: Report, now: datetime) -> bool:
    """Store a node's report and return whether it was news; the first one is.

    Two processes that take the same news at once store it one after the other, so that exactly
    one of them finds it new. Raises DatabaseError.
    """
    told = report.told()
    with transaction.atomic():
        entry, is_first = PresenceEntry.objects.select_for_update().get_or_create(
            key=report.key, defaults={"seen_at": now}
        )
        stored = {name: getattr(entry, name) for name in told}
        for name, value in told.items():
            setattr(entry, name, value)
        entry.text = report.text
        entry.details = {**entry.details, **report.details}
        entry.seen_at = now
        entry.save()
    return is_first or is_news(stored, told)


def entries() -> list[dict[str, Any]]:
    """Return what is known of the nodes as the protocol writes it, the newest report first."""
    newest = PresenceEntry.objects.order_by("-seen_at")[:MAX_ENTRIES]
    return [
        {
            **entry.details,
            "host": entry.host,
            "ip": entry.ip,
            "version": entry.version,
            "mode": entry.mode,
            "reason": entry.reason,
            "text": entry.text,
            "ts": milliseconds(entry.seen_at),
        }
        for entry in newest
    ]
