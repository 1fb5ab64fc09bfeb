"""What `manage.py check --deploy` says about gateway tokens, cookies and proxies.

Django's own checks say the rest, such as DEBUG or a weak SECRET_KEY. Those that do not fit a site
behind a proxy are silenced in the settings.
"""

from __future__ import annotations

import ipaddress
from datetime import timedelta
from typing import Any, Final

from django.conf import settings
from django.core.checks import CheckMessage, Tags, Warning, register  # noqa: A004
from django.db import DatabaseError
from django.utils import timezone

from wake.models import GatewayToken, HashedToken
from wake.tokens import is_usable

OLDEST_TOKEN: Final = timedelta(days=365)


@register(Tags.security, deploy=True)
def check_gateway_tokens(**_: Any) -> list[CheckMessage]:
    """Report gateway tokens that have been in use for long."""
    hint = "Replace it with manage.py gateway_tokens rotate NAME, and give the client the new one."
    return old_tokens(GatewayToken, "gateway token", hint, "wake.W001")


def old_tokens(model: type[HashedToken], kind: str, hint: str, id: str) -> list[CheckMessage]:  # noqa: A002
    """Return a warning if tokens of this kind are more than a year old and still valid."""
    now = timezone.now()
    try:
        old = model._default_manager.filter(created_at__lt=now - OLDEST_TOKEN)
        names = [f'"{token.name}"' for token in old if is_usable(token, now)]
    except DatabaseError:
        return []  # not migrated yet, or away: nothing is served either
    if not names:
        return []
    text = f"These {kind}s are over a year old and still valid: {', '.join(names)}."
    return [Warning(text, hint, id=id)]


@register(Tags.security, deploy=True)
def check_cookies(**_: Any) -> list[CheckMessage]:
    """Report cookies that travel in the clear, or that never come back."""
    if not settings.SESSION_COOKIE_SECURE or not settings.CSRF_COOKIE_SECURE:
        return [
            Warning(
                "The admin's cookies travel without HTTPS too: SECURE_COOKIES is off.",
                "Serve through a proxy with TLS and name its address in TRUSTED_PROXIES, which "
                "turns SECURE_COOKIES on.",
                id="wake.W002",
            )
        ]
    if not settings.TRUSTED_PROXIES:
        return [
            Warning(
                "Nobody can log in to the admin: SECURE_COOKIES asks for HTTPS, and no proxy is "
                "believed that it was used.",
                "Name the address of the proxy with TLS in TRUSTED_PROXIES.",
                id="wake.W003",
            )
        ]
    return []


@register(Tags.security, deploy=True)
def check_proxies(**_: Any) -> list[CheckMessage]:
    """Report a proxy setting that believes everybody, or a name, which nothing is compared with."""
    proxies: list[str] = settings.TRUSTED_PROXIES
    everybody = [f'"{name}"' for name in proxies if _is_everybody(name)]
    wrong = [f'"{name}"' for name in proxies if _network(name) is None and name != "*"]
    messages: list[CheckMessage] = []
    if everybody:
        messages.append(
            Warning(
                "Every client can say where it comes from: TRUSTED_PROXIES holds "
                f"{', '.join(everybody)}.",
                "Name the addresses or networks of the proxies in TRUSTED_PROXIES, and no others.",
                id="wake.W004",
            )
        )
    if wrong:
        messages.append(
            Warning(
                "TRUSTED_PROXIES holds what is no address and no network, and has no effect: "
                f"{', '.join(wrong)}.",
                "Write addresses such as 10.0.0.7 or networks such as 10.0.0.0/24 into "
                "TRUSTED_PROXIES.",
                id="wake.W005",
            )
        )
    return messages


def _is_everybody(name: str) -> bool:
    network = _network(name)
    return name == "*" or (network is not None and network.prefixlen == 0)


def _network(name: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(name)
    except ValueError:
        return None
