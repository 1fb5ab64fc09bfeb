"""The chat runner: an OpenAI-compatible server (Ollama, vLLM, …) takes the turn.

`POST {url}/chat/completions` with the session's earlier turns and the prompt as a user's message.
The reply is asked for as a stream and taken as one JSON object too: some servers do not stream.

* What the model says is the reply; what it thinks (`reasoning`, `reasoning_content`) and the tools
  that it would call are not. A reply longer than MAX_REPLY_BYTES is cut and read no further.
* A stream that ends before the server has said that the reply is whole is a failed attempt.
* A request that is too long for the model, or leaves it no room to say anything, is sent again
  without the older half of its earlier turns, within the same turn, until none are left.
* 4xx says that the request is wrong and will stay so, as for the http runner, except where somebody
  can mend it while the events wait: the key (401, 403), the account (402). All else is tried again,
  not before the answer's Retry-After. An error in the middle of a stream counts as an answer with
  its `code`, or 500.

The key is in the environment, never in the database, and in no error: a server that echoes it is
quoted without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import msgspec
from aiohttp import ClientError, ClientResponse
from django.utils import timezone

from wake.errors import KeyUnavailable
from wake.heartbeats.runners import (
    MAX_REPLY_BYTES,
    Delivered,
    Exchange,
    Failed,
    Outcome,
    Runner,
    Turn,
    cut,
)
from wake.heartbeats.runners.event_stream import EventStream, EventTooLong
from wake.heartbeats.runners.http_client import (
    Client,
    NoAnswer,
    is_redirect,
    is_success,
    parse_retry_after,
    read_bounded,
)
from wake.heartbeats.runners.keys import read_key
from wake.presentation import one_line
from wake.redaction import without_credentials

# What is held of an answer at once: all of it, or one event of its stream. JSON writes some
# characters in six bytes, and a model may think before it speaks.
MAX_HELD_BYTES: Final = 4 * 1024 * 1024
# A stream wraps each word into some 300 bytes, those that the model only thinks included.
MAX_STREAM_BYTES: Final = 64 * 1024 * 1024
MAX_ERROR_BODY_BYTES: Final = 64 * 1024
MAX_SHOWN_CHARACTERS: Final = 1000

_PATH = "/chat/completions"
_WAITING_HELPS = frozenset({401, 402, 403, 408, 409, 425, 429})
# Servers have no common word for it, nor a common status. Taken for it by mistake, a request is
# sent a few times more.
_TOO_LONG_STATUSES = frozenset({400, 422, 500})
_TOO_LONG = re.compile(
    r"context[ _-]?(length|size|window|exceeded)|too (long|large)|(longer|larger) than"
    r"|reduce the length|maximum number of tokens",
    re.IGNORECASE,
)
# Reasons for which a reply ends that is not whole.
_BROKEN_OFF = frozenset({"error", "abort"})
_ENDED_EARLY = "the stream ended before the reply was whole"
_TOO_MUCH = "its answer is longer than anything that a model says"


class ChatRunner(Runner):
    """Asks the agent's server for each turn's reply, with one client for all of them."""

    def __init__(self, look_again: Callable[[], None] = lambda: None) -> None:
        super().__init__(look_again)
        self._held_client: Client | None = None

    async def run(self, turn: Turn) -> Outcome:
        """Ask for the reply, with fewer and fewer earlier turns where they do not fit."""
        try:
            key = read_key(turn.agent.key_variable)
            url = completions_url(turn.agent.url)
        except (KeyUnavailable, ValueError) as error:
            return Failed(f"nothing was sent: {error}")
        transcript = turn.transcript
        while True:
            try:
                return Delivered(await self._ask(url, key, request_body(turn, transcript)))
            except ChatError as error:
                if not (error.is_too_long and transcript):
                    return _failed(error, url, key)
            transcript = transcript[(len(transcript) + 1) // 2 :]

    async def close(self) -> None:
        """Close the connections."""
        if self._held_client:
            await self._held_client.close()
            self._held_client = None

    async def _ask(self, url: str, key: str, body: bytes) -> str:
        """Return the reply, at most MAX_REPLY_BYTES in UTF-8. Raises ChatError."""
        headers = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream, application/json",
        }
        if key:  # it goes before a user and password in the URL
            headers["Authorization"] = f"Bearer {key}"
        try:
            async with self._client().post(url, body, headers) as response:
                if not is_success(response):
                    raise await _refusal(response)
                if response.content_type == "text/event-stream":
                    return await _streamed_reply(response)
                pieces = response.content.iter_any()
                answer, is_whole = await read_bounded(pieces, MAX_HELD_BYTES)
                if not is_whole:
                    raise ChatError(_TOO_MUCH)
                return whole_reply(answer)
        except NoAnswer as error:
            raise ChatError(str(error)) from error

    def _client(self) -> Client:
        if self._held_client is None:
            self._held_client = Client()
        return self._held_client


class ChatError(Exception):
    """Why there is no reply: in the server's words where it has answered with an error.

    `status` is that of its answer, or what the error in a stream says; None: there was none.
    `is_too_long`: a shorter request may fare better.
    """

    def __init__(
        self,
        said: str,
        status: int | None = None,
        *,
        is_too_long: bool = False,
        retry_after: timedelta | None = None,
    ) -> None:
        super().__init__(said)
        self.said = said
        self.status = status
        self.is_too_long = is_too_long
        self.retry_after = retry_after

    @property
    def is_permanent(self) -> bool:
        """Whether the same request will fare no better."""
        return (
            self.status is not None
            and 400 <= self.status < 500
            and self.status not in _WAITING_HELPS
        )


def completions_url(url: str) -> str:
    """Return where to post, for a server's base URL or the whole one; a query stays.

    Raises ValueError, which does not quote it.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ValueError("the agent's URL is not valid") from error
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError("the agent has no URL such as http://127.0.0.1:11434/v1")
    path = parts.path.rstrip("/").removesuffix(_PATH) + _PATH
    return urlunsplit(parts._replace(path=path, fragment=""))


def request_body(turn: Turn, transcript: Sequence[Exchange]) -> bytes:
    """Return the request: the earlier turns, the oldest first, and the prompt. JSON in UTF-8."""
    messages = [
        {"role": role, "content": content}
        for exchange in transcript
        for role, content in (("user", exchange.prompt), ("assistant", exchange.reply))
    ]
    messages.append({"role": "user", "content": turn.prompt})
    return msgspec.json.encode({"model": turn.agent.model, "messages": messages, "stream": True})


def _failed(error: ChatError, url: str, key: str) -> Failed:
    # In this order: what was read may end within the key, but far behind what is shown.
    said = error.said.replace(key, "[key]") if key else error.said
    said = one_line(said[:MAX_SHOWN_CHARACTERS])
    shown_url = without_credentials(url)
    answered = f"{shown_url} answered {error.status}"
    if error.status is None:
        answered = f"no reply from {shown_url}"
    return Failed(
        f"{answered}: {said}" if said else answered,
        permanent=error.is_permanent,
        retry_after=error.retry_after,
    )


# --- Answers ------------------------------------------------------------------------------------


class _Message(msgspec.Struct):
    # A text or null; some servers give a list of parts.
    content: Any = None


class _Choice(msgspec.Struct):
    index: int | None = None
    delta: _Message | None = None
    message: _Message | None = None
    finish_reason: str | None = None


class _Answer(msgspec.Struct):
    """A whole answer, or one event of its stream. What is of no use here is left out."""

    choices: list[_Choice] | None = None
    error: Any = None


class ReplyParts:
    """A reply as it comes, answer by answer.

    `is_whole`: the server has said that the reply has ended. `is_over`: nothing more of it is
    taken, either because nothing more comes or because there is more of it than is kept.
    """

    def __init__(self) -> None:
        self.is_whole = False
        self.is_over = False
        self._parts: list[str] = []
        self._size = 0
        self._ran_out = False

    def text(self) -> str:
        """Return what there is of the reply, at most MAX_REPLY_BYTES in UTF-8.

        Raises ChatError where the model's room was used up before it had said anything.
        """
        if self._ran_out and not self._parts:
            raise ChatError("the model had no room left to say anything", is_too_long=True)
        # Some servers cut a character in two halves, each of them escaped in its own event.
        text = "".join(self._parts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return cut(text)

    def add(self, written: str) -> None:
        """Take a whole answer, or one event of a stream. Raises ChatError."""
        if self.is_over:
            return
        if written == "[DONE]":
            # Alone it says nothing: vLLM sends it after errors too, even after some it keeps back.
            if not (self.is_whole or self._parts):
                raise ChatError(_ENDED_EARLY)
            self.is_whole = self.is_over = True
            return
        answer = _parse(written)
        if answer.error:
            raise _error_in(answer.error, None)
        for choice in answer.choices or ():
            if not choice.index:
                self._add_choice(choice)

    def _add_choice(self, choice: _Choice) -> None:
        message = choice.message or choice.delta
        if said := _text(message.content if message else None):
            self._parts.append(said)
            self._size += len(said.encode("utf-8", "replace"))
            self.is_over = self._size > MAX_REPLY_BYTES
        if choice.finish_reason in _BROKEN_OFF:
            raise ChatError(f'the reply broke off: "{choice.finish_reason}"')
        self._ran_out = self._ran_out or choice.finish_reason == "length"
        # Ollama used to send "" for null. It may come more than once, so it ends nothing yet.
        self.is_whole = self.is_whole or bool(choice.finish_reason)


def _parse(written: str) -> _Answer:
    try:
        # Unlike msgspec's own, it takes half of an escaped character.
        return msgspec.convert(json.loads(written), _Answer)
    except (ValueError, RecursionError) as error:  # bad JSON, or another shape
        raise ChatError("its answer is not that of a chat server") from error


def _text(content: Any) -> str:
    """Return a message's text: the content itself, or the text parts of a list."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = (part.get("text") for part in parts if isinstance(part, dict))
    return "".join(text for text in texts if isinstance(text, str))


def whole_reply(body: bytes) -> str:
    """Return the reply in an answer that is one JSON object. Raises ChatError."""
    reply = ReplyParts()
    reply.add(body.decode("utf-8", "replace"))
    if not reply.is_whole and not reply.text():
        raise ChatError("its answer holds no reply")
    return reply.text()


async def _streamed_reply(response: ClientResponse) -> str:
    """Return the reply in a stream, once it is over. Raises ChatError and aiohttp's ClientError."""
    stream, reply, size = EventStream(MAX_HELD_BYTES), ReplyParts(), 0
    try:
        async for piece in response.content.iter_any():
            for data in stream.feed(piece):
                reply.add(data)
            if reply.is_over:
                return reply.text()
            size += len(piece)
            if size > MAX_STREAM_BYTES:
                raise ChatError(_TOO_MUCH)
    except EventTooLong as error:
        raise ChatError(_TOO_MUCH) from error
    except ClientError:
        if not reply.is_whole:
            raise
    if not reply.is_whole:
        raise ChatError(_ENDED_EARLY)
    return reply.text()


async def _refusal(response: ClientResponse) -> ChatError:
    retry_after = parse_retry_after(response.headers.get("retry-after"), timezone.now())
    if is_redirect(response):
        return ChatError("redirects are not followed", response.status)
    body, _ = await read_bounded(response.content.iter_any(), MAX_ERROR_BODY_BYTES)
    return refusal_in(body, response.status, retry_after)


def refusal_in(body: bytes, status: int, retry_after: timedelta | None = None) -> ChatError:
    """Return what an answer with an error status says, in one of the shapes that are about."""
    text = body.decode("utf-8", "replace")
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        answer = text
    # Some servers leave the object around it out, and vLLM once did.
    said = answer.get("error") or answer if isinstance(answer, dict) else text
    return _error_in(said, status, retry_after)


def _error_in(said: Any, status: int | None, retry_after: timedelta | None = None) -> ChatError:
    """Return the error that `error` in an answer stands for: an object, or only a text.

    Without a status, as in a stream, the object's own `code` is taken for one.
    """
    fields = said if isinstance(said, dict) else {}
    message, code, kind = fields.get("message"), fields.get("code"), fields.get("type")
    if status is None:
        status = code if isinstance(code, int) and 400 <= code <= 599 else 500
    if not isinstance(message, str):
        message = said if isinstance(said, str) else json.dumps(said)
    is_too_long = status == 413 or (
        status in _TOO_LONG_STATUSES and bool(_TOO_LONG.search(f"{code} {kind} {message}"))
    )
    return ChatError(message, status, is_too_long=is_too_long, retry_after=retry_after)
