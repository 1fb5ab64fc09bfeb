"""A request as a person writes it down to try it, and its answer as a sender would get it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Final
from urllib.parse import parse_qsl

from rest_framework.renderers import JSONRenderer

from hooks.answers import Answer
from hooks.configuration import HookConfiguration

_HOST = re.compile(r"https?://[^/]*", re.IGNORECASE)
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_JSON: Final = "Content-Type: application/json"
_TEXT: Final = "Content-Type: text/plain; charset=utf-8"


def hook_path(written: str, base_path: str) -> str:
    """Return the path below the base path that a person means: by it, a site's path, or a URL.

    Raises ValueError when there is none.
    """
    path = _HOST.sub("", written.strip(), count=1)
    if "?" in path:
        raise ValueError("write what follows the ? as the query")
    below = f"{path}/".removeprefix(f"{base_path}/").strip("/")
    if not below:
        raise ValueError(f"name a path below {base_path}/, for example wake")
    return below


def headers(lines: Iterable[str]) -> dict[str, str]:
    """Return the headers that lines such as `X-Event: push` write, by lower-case name.

    Blank lines do not count; values of a name that comes twice are joined, as the server does it.
    Raises ValueError for a line that is no header.
    """
    found: dict[str, str] = {}
    for line in lines:
        if not line.strip():
            continue
        written, colon, value = line.partition(":")
        if not colon or not _HEADER_NAME.fullmatch(written.strip()):
            raise ValueError(f"{line.strip()[:60]!a} is no header; write Name: value")
        name, value = written.strip().lower(), value.strip()
        found[name] = f"{found[name]},{value}" if name in found else value
    return found


def query(written: str) -> dict[str, str]:
    """Return the parameters that a query such as `kind=push&id=1` writes; the last one wins."""
    return dict(parse_qsl(written.strip().removeprefix("?"), keep_blank_values=True))


def in_http(answer: Answer, hooks: HookConfiguration) -> str:
    """Return an answer as its sender gets it: status, headers of its own, empty line, body."""
    body = ""
    lines: list[str] = []
    if not hooks.enabled:
        body = "(the site's page for an address that does not exist)"
    elif answer.status == HTTPStatus.UNAUTHORIZED:
        # One answer for every wrong credential, whatever was wrong with it.
        body, lines = "Unauthorized", [_TEXT, "WWW-Authenticate: Bearer"]
    elif answer.text:
        body, lines = answer.text, [_TEXT]
    elif answer.body is not None:
        body, lines = JSONRenderer().render(answer.body).decode(), [_JSON]
    if answer.retry_after_seconds is not None:
        lines.append(f"Retry-After: {answer.retry_after_seconds}")
    status = f"{answer.status} {HTTPStatus(answer.status).phrase}"
    return "\n".join([status, *lines, *(["", body] if body else [])])
