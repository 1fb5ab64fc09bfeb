"""What everything shares that speaks HTTP to an agent: the client, and how its answers are read.

Proxies and certificates come from the environment (HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE), as for
any HTTP client; an agent on this machine is never reached through a proxy.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Final
from urllib.request import getproxies, proxy_bypass

import certifi
from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientResponse,
    ClientResponseError,
    ClientSession,
    ClientTimeout,
    DummyCookieJar,
    InvalidURL,
    TCPConnector,
)
from yarl import URL

from wake.presentation import one_line

CONNECT_TIMEOUT_SECONDS: Final = 10.0

MAX_SAID_CHARACTERS: Final = 200

_INVALID: Final = "the URL is not valid"
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class NoAnswer(Exception):
    """Why there is no answer, or only a part of one: for people, and without the URL."""


class Client:
    """Posts; many requests can be under way at once, and share nothing but connections.

    Only connecting has a time limit: the rest is the caller's to keep, and so is how many requests
    there are. Redirects are not followed: they would carry what is sent to where nobody sent it.
    Made and used on one event loop.
    """

    def __init__(self) -> None:
        self._proxies: Mapping[str, str] = getproxies()
        self._session = ClientSession(
            connector=TCPConnector(limit=0, ssl=_certificates()),
            timeout=ClientTimeout(total=None, connect=CONNECT_TIMEOUT_SECONDS),
            cookie_jar=DummyCookieJar(),
            # What is read is bounded, and so must be what it stands for.
            auto_decompress=False,
            headers={
                "User-Agent": "openclaw-wake-gateway",
                "Accept": "application/json",
                "Accept-Encoding": "identity",
            },
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    @asynccontextmanager
    async def post(
        self, url: str, body: bytes, headers: Mapping[str, str]
    ) -> AsyncIterator[ClientResponse]:
        """Post a body and give the answer, whose body is read while this lasts.

        A user and password in the URL are sent, unless there is an Authorization header. Raises
        NoAnswer, also for what breaks off while it is read.
        """
        try:
            address = URL(url)
        except ValueError as error:
            raise NoAnswer(_INVALID) from error
        if address.scheme not in {"http", "https"} or not address.host:
            raise NoAnswer(_INVALID)
        if "Authorization" in headers:
            address = address.with_user(None)
        try:
            async with self._session.post(
                address,
                data=body,
                headers=headers,
                allow_redirects=False,
                proxy=self._proxy_for(address),
            ) as response:
                yield response
        except (ClientError, OSError) as error:
            raise NoAnswer(_reason(error)) from error

    def _proxy_for(self, address: URL) -> str | None:
        host = address.host or ""
        if host in _LOOPBACK or proxy_bypass(host):
            return None
        return self._proxies.get(address.scheme) or self._proxies.get("all")


@cache
def _certificates() -> ssl.SSLContext:
    """Return what servers are checked against; reading it takes a good part of a second."""
    file, directory = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if not file and not directory:
        file = certifi.where()
    return ssl.create_default_context(cafile=file or None, capath=directory or None)


def _reason(error: Exception) -> str:
    if isinstance(error, InvalidURL):  # its message quotes the URL
        return _INVALID
    if isinstance(error, ClientConnectorError):
        return f"cannot connect: {one_line(str(error.os_error))}"
    # As a text it quotes the URL too.
    said = error.message if isinstance(error, ClientResponseError) else str(error)
    return f"{type(error).__name__}: {one_line(said)[:MAX_SAID_CHARACTERS] or 'no answer'}"


def is_success(response: ClientResponse) -> bool:
    """Whether the answer has a 2xx status."""
    return 200 <= response.status < 300


def is_redirect(response: ClientResponse) -> bool:
    """Whether the answer sends the client elsewhere."""
    return response.status in {301, 302, 303, 307, 308} and "Location" in response.headers


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
