"""The http runner: the turn is a signed POST to the agent's URL.

* 2xx is delivered. A JSON body's `reply`, if it is a string, is kept; any other body is no reply.
  An answer that breaks off in its body counts as none: better twice than never.
* 4xx other than 408, 425 and 429 says that the request is wrong and will stay so: permanent.
* All else is tried again, not before the answer's Retry-After. That includes 3xx: redirects are
  not followed, as they would carry the prompt to where nobody sent it, and are often temporary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final
from uuid import UUID

import msgspec
from aiohttp import ClientResponse
from django.utils import timezone

from wake.heartbeats.runners import MAX_REPLY_BYTES, Delivered, Failed, Outcome, Runner, Turn, cut
from wake.heartbeats.runners.http_client import (
    Client,
    NoAnswer,
    is_redirect,
    is_success,
    parse_retry_after,
    read_bounded,
)
from wake.heartbeats.runners.wire import as_json
from wake.presentation import one_line
from wake.redaction import without_credentials
from wake.signing import signature_headers

# JSON writes some characters in six bytes; a body that is longer than this is read no further,
# and holds no reply.
MAX_BODY_BYTES: Final = 6 * MAX_REPLY_BYTES + 64 * 1024
MAX_SHOWN_BODY_BYTES: Final = 1000
RETRYABLE_CLIENT_ERRORS: Final = frozenset({408, 425, 429})


class HttpRunner(Runner):
    """Posts each turn to its agent's URL, all of them with one client."""

    def __init__(self, look_again: Callable[[], None] = lambda: None) -> None:
        super().__init__(look_again)
        self._held_client: Client | None = None

    async def run(self, turn: Turn) -> Outcome:
        """Post the turn and return what the answer means."""
        url, secret = turn.agent.url, turn.agent.signing_secret
        return await post_signed(
            self._client(), url, secret, turn.agent.id, turn.run_id, request_body(turn)
        )

    async def close(self) -> None:
        """Close the connections."""
        if self._held_client:
            await self._held_client.close()
            self._held_client = None

    def _client(self) -> Client:
        if self._held_client is None:
            self._held_client = Client()
        return self._held_client


def request_body(turn: Turn) -> bytes:
    """Return the turn as the agent receives it: JSON in UTF-8."""
    return msgspec.json.encode(as_json(turn))


async def post_signed(
    client: Client, url: str, secret: str, agent_id: str, run_id: UUID, body: bytes
) -> Delivered | Failed:
    """Post a body in JSON, signed with the agent's secret, and return what the answer means."""
    shown_url = without_credentials(url)
    try:
        signature = signature_headers(secret, str(run_id), body, timezone.now())
    except ValueError:
        return Failed(
            f"nothing was sent to {shown_url}: the agent has no usable signing secret; "
            f"set one with manage.py agents set {agent_id} --secret whsec_…"
        )
    headers = {"Content-Type": "application/json", **signature}
    try:
        async with client.post(url, body, headers) as response:
            limit = MAX_BODY_BYTES if is_success(response) else MAX_SHOWN_BODY_BYTES
            answer, is_whole = await read_bounded(response.content.iter_any(), limit)
            return _outcome(response, shown_url, answer, is_whole)
    except NoAnswer as error:
        return Failed(f"could not reach {shown_url}: {error}")


def _outcome(
    response: ClientResponse, shown_url: str, answer: bytes, is_whole: bool
) -> Delivered | Failed:
    if is_success(response):
        return Delivered(reply_in(answer) if is_whole else "")
    status = response.status
    said = "redirects are not followed"
    if not is_redirect(response):
        said = one_line(answer.decode("utf-8", "replace"))
    return Failed(
        f"{shown_url} answered {status}" + (f": {said}" if said else ""),
        permanent=400 <= status < 500 and status not in RETRYABLE_CLIENT_ERRORS,
        retry_after=parse_retry_after(response.headers.get("retry-after"), timezone.now()),
    )


class _Answer(msgspec.Struct):
    reply: Any = None


def reply_in(body: bytes) -> str:
    """Return the string `reply` of a JSON object, or an empty one where there is none."""
    try:
        reply = msgspec.json.decode(body, type=_Answer).reply
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return ""
    return cut(reply) if isinstance(reply, str) else ""
