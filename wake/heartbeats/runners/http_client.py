"""What everything shares that speaks HTTP to an agent: the client, and how its answers are read.

Proxies and certificates come from the environment (HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE), as for
any HTTP client; an agent on this machine is never reached through a proxy.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from ssl import SSLContext
from typing import Final

import httpx

CONNECT_TIMEOUT_SECONDS: Final = 10.0

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def new_client() -> httpx.AsyncClient:
    """Return a client that many requests can use at once; they share nothing but connections.

    Only connecting has a time limit: the rest is the caller's to keep, and so is how many requests
    there are. Redirects are not followed: they would carry what is sent to where nobody sent it.
    """
    return httpx.AsyncClient(
        verify=_certificates(),
        timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_SECONDS),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
        follow_redirects=False,
        mounts={f"all://{host}": None for host in _LOOPBACK},
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        headers={
            "user-agent": "openclaw-wake-gateway",
            "accept": "application/json",
            # What is read is bounded, and so must be what it stands for.
            "accept-encoding": "identity",
        },
    )


@cache
def _certificates() -> SSLContext:
    """Return what servers are checked against; reading it takes a good part of a second."""
    return httpx.create_ssl_context()


async def read_bounded(chunks: AsyncIterator[bytes], limit: int) -> tuple[bytes, bool]:
    """Return at most `limit` bytes, and whether that is all there was."""
    read = bytearray()
    async for chunk in chunks:
        read += chunk
        if len(read) > limit:
            return bytes(read[:limit]), False
    return bytes(read), True


def parse_retry_after(value: str | None, now: datetime) -> timedelta | None:
    """Return how long a Retry-After header asks to wait: seconds, or until an HTTP date.

    None when it is missing, past, or not understood.
    """
    written = (value or "").strip()
    try:
        if written.isascii() and written.isdigit():
            wait = timedelta(seconds=int(written))
        else:
            until = parsedate_to_datetime(written)
            wait = (until if until.tzinfo else until.replace(tzinfo=UTC)) - now
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return wait if wait > timedelta(0) else None
