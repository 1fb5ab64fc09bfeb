"""The admin's sidebar: which pages there are, in which groups, and who sees them; and its icon."""

from __future__ import annotations

from typing import Any, Final

from django.http import HttpRequest
from django.templatetags.static import static
from django.urls import reverse

# Group, then title, icon (Material Symbols), application and model of each page in it. A page that
# is of no model has its address's name at the end; its model is the one that must be visible.
GROUPS: Final[tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]] = (
    (
        "Work",
        (
            ("Sessions", "forum", "wake", "session"),
            ("Events", "bolt", "wake", "systemevent"),
            ("Heartbeats", "ecg_heart", "wake", "heartbeat"),
            ("Reply posts", "outbox", "wake", "replypost"),
        ),
    ),
    (
        "Agents",
        (
            ("Agents", "smart_toy", "wake", "agent"),
            ("Gateway settings", "tune", "wake", "gatewaysettings"),
            ("Presence", "sensors", "wake", "presenceentry"),
        ),
    ),
    (
        "Hooks",
        (
            ("Policy", "policy", "hooks", "hookpolicy"),
            ("Mappings", "alt_route", "hooks", "hookmapping"),
            ("Simulator", "experiment", "hooks", "hookpolicy", "hooks_simulator"),
            ("Deliveries", "inbox", "hooks", "hookdelivery"),
            ("Tokens", "key", "hooks", "hooktoken"),
            ("Failed credentials", "key_off", "hooks", "failedcredentials"),
        ),
    ),
    (
        "Access",
        (
            ("Gateway tokens", "vpn_key", "wake", "gatewaytoken"),
            ("Users", "person", "auth", "user"),
            ("Groups", "group", "auth", "group"),
        ),
    ),
)


def sidebar(request: HttpRequest) -> list[dict[str, Any]]:
    """Return the sidebar as Unfold reads it, with the pages that this user may open."""
    everybody = [
        {"title": "How things stand", "icon": "monitoring", "link": reverse("admin:index")},
        # Every address begins with its own, `/`, which would mark it as the page one is on.
        {"title": "Console", "icon": "cell_tower", "link": reverse("console"), "active": False},
    ]
    groups: list[dict[str, Any]] = [{"title": "", "items": everybody}]
    for group, pages in GROUPS:
        items = [
            {"title": title, "icon": icon, "link": _address(application, model, *name)}
            for title, icon, application, model, *name in pages
            if _may_open(request, application, model)
        ]
        if items:
            groups.append({"title": group, "separator": True, "items": items})
    return groups


def icon(request: HttpRequest) -> str:
    """Return the address of the site's icon."""
    return static("wake/icon.svg")


def _address(application: str, model: str, name: str = "") -> str:
    return reverse(f"admin:{name or f'{application}_{model}_changelist'}")


def _may_open(request: HttpRequest, application: str, model: str) -> bool:
    return any(
        request.user.has_perm(f"{application}.{verb}_{model}") for verb in ("view", "change")
    )
