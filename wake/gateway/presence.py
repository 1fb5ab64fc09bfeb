"""Presence: who is there and what they last said of themselves, shared through the database.

Nodes report by `system-event`; clients that stay connected are reported by the process that they
are connected to (`keep`). Who gave no sign for five minutes is not there any more.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from django.db import transaction
from django.db.models import Q

from wake import doorbell
from wake.gateway import scopes
from wake.gateway.frames import ConnectParams
from wake.models import PresenceEntry
from wake.status import milliseconds

# A node that says it is still there, without news.
PERIODIC_REASONS: Final = frozenset({"periodic", "heartbeat"})
MAX_ENTRIES: Final = 200
MAX_AGE: Final = timedelta(minutes=5)
# What a node said is remembered longer than it is shown: what it says again is no news then.
REMEMBERED: Final = timedelta(days=1)
MAX_REMEMBERED: Final = 1000
# The reason of a client that left.
DISCONNECTED: Final = "disconnect"

_CHANGES_AT_EVERY_SIGN: Final = frozenset({"ts", "text", "lastInputSeconds"})

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


def of_client(
    params: ConnectParams, connection_id: str, address: str, granted: Collection[str]
) -> Report | None:
    """Return the report of a client that connects; None for a command line, which soon is gone.

    Its key is the client's own where the client proved a device or may report any node anyway,
    else that of its connection: nobody else's entry is overwritten.
    """
    client = params.client
    if client.mode == "cli":
        return None
    may_name_itself = scopes.includes(granted, scopes.ADMIN)
    device_id = params.device.id.lower() if params.device else ""
    instance_id = (client.instance_id or "") if may_name_itself else ""
    version = f" · app {client.version}" if client.version else ""
    details = {
        "deviceId": device_id or None,
        "instanceId": client.instance_id,
        "platform": client.platform,
        "deviceFamily": client.device_family,
        "roles": [params.role],
        "scopes": list(granted),
    }
    return Report(
        text=_storable(f"Node: {client.id} ({address}){version} · mode {client.mode}", 1000),
        device_id=device_id,
        instance_id=_storable(instance_id or connection_id),
        host=_storable(client.id),
        ip=_storable(address),
        version=_storable(client.version),
        mode=_storable(client.mode),
        reason="connect",
        details={
            name: _storable(value) if isinstance(value, str) else value
            for name, value in details.items()
            if value is not None
        },
    )


def _storable(text: str, length: int = 100) -> str:
    """Return what the database takes of a client's word: PostgreSQL stores no NUL."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()[:length]


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
        if is_first:
            _drop_old(now)
        doorbell.ring()
    return is_first or is_news(stored, told)


def keep(arrived: Sequence[Report], left: Collection[str], now: datetime) -> None:
    """Record clients that came, and those that went by their keys. Raises DatabaseError."""
    rows = [
        PresenceEntry(
            key=report.key,
            text=report.text,
            details=report.details,
            seen_at=now,
            **report.told(),
        )
        for report in arrived
    ]
    with transaction.atomic():
        PresenceEntry.objects.bulk_create(
            rows,
            update_conflicts=True,
            unique_fields=["key"],
            update_fields=["host", "ip", "version", "mode", "reason", "text", "details", "seen_at"],
        )
        PresenceEntry.objects.filter(key__in=left).update(reason=DISCONNECTED, seen_at=now)
        _drop_old(now)
        doorbell.ring()


def give_sign(keys: Collection[str], now: datetime) -> None:
    """Note that these are still there, and forget who long is not. Raises DatabaseError."""
    PresenceEntry.objects.filter(key__in=keys).update(seen_at=now)
    _drop_old(now)


def _drop_old(now: datetime) -> None:
    crowded_out = PresenceEntry.objects.order_by("-seen_at", "pk").values_list("pk", flat=True)
    PresenceEntry.objects.filter(
        Q(seen_at__lt=now - REMEMBERED) | Q(pk__in=list(crowded_out[MAX_REMEMBERED:][:1000]))
    ).delete()


def entries(now: datetime) -> list[dict[str, Any]]:
    """Return who is there as the protocol writes it, the newest sign first."""
    newest = PresenceEntry.objects.filter(seen_at__gte=now - MAX_AGE).order_by("-seen_at", "pk")
    return [
        {
            **entry.details,
            "key": entry.key,
            "host": entry.host,
            "ip": entry.ip,
            "version": entry.version,
            "mode": entry.mode,
            "reason": entry.reason,
            "text": entry.text,
            "ts": milliseconds(entry.seen_at),
        }
        for entry in newest[:MAX_ENTRIES]
    ]


def without_times(present: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return entries without what changes at every sign, in an order of their own."""
    still = [
        {name: value for name, value in entry.items() if name not in _CHANGES_AT_EVERY_SIGN}
        for entry in present
    ]
    return sorted(still, key=repr)
