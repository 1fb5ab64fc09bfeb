"""How any client of the gateway protocol begins: where it connects, and what it says first."""

from __future__ import annotations

import ipaddress
import sys
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import uuid4

from wake.status import version

STEP_SECONDS: Final = 10.0
CLOSE_SECONDS: Final = 1.0
MAX_MESSAGE_BYTES: Final = 25 * 1024 * 1024


def connect_params(token: str, scopes: tuple[str, ...]) -> dict[str, Any]:
    """Return the params of a `connect` that asks for these scopes; an empty token is none."""
    return {
        "minProtocol": 3,
        "maxProtocol": 4,
        # OpenClaw gives a client of another mode no scope without a paired device.
        "client": {
            "id": "gateway-client",
            "version": version(),
            "platform": sys.platform,
            "mode": "backend",
            "instanceId": str(uuid4()),
        },
        "caps": [],
        "role": "operator",
        "scopes": list(scopes),
        "auth": {"token": token} if token else {},
    }


def websocket_url(url: str) -> str:
    """Return the ws or wss URL that a gateway's http or https URL stands for."""
    for written, meant in (("http://", "ws://"), ("https://", "wss://")):
        if url.startswith(written):
            return meant + url.removeprefix(written)
    return url


def is_this_machine(url: str) -> bool:
    """Whether a URL's host is a loopback address or `localhost`. Raises ValueError."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
