"""The template language of mappings: text with expressions such as `{{payload.action}}`.

An expression names one value of the request and nothing else: there are no operators, calls,
attributes or filters, and what was rendered is never looked at again. The forms:

    {{payload.a.b}}  {{a.b}}     a field of the payload; both mean the same
    {{messages[0].subject}}      an element of an array, counted from 0
    {{payload}}                  the whole payload
    {{headers.x-event}}          a header of the request, whatever the case of its name
    {{query.kind}}               a parameter of the URL
    {{path}}                     the path below the hooks' base path
    {{now}}                      the time of the request, ISO 8601 in UTC

A payload field that is called headers, query, path, now or payload is reached with `payload.`.
What is missing or null renders empty, and so do headers that carry a credential. Strings render
as they are; all else as JSON writes it, without spaces. Nothing here touches Django.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final
from uuid import UUID

import msgspec

# A header or parameter whose name says that it proves who sent the request: an event's text is
# read by an agent, which is no place for a secret.
_CREDENTIAL_NAME = re.compile(
    "authorization|cookie|token|secret|signature|passw|credential|hmac|digest|jwt|assertion|oidc"
    "|^x-auth|api[-_]?key|(?<!idempotency)[-_]key$|^key$|(^|[-_])(sig|auth)$",
    re.IGNORECASE,
)

_NAME = r"[\w$@:/-]+"
_PAYLOAD_STEP = re.compile(rf"(?:^|\.)(?P<name>{_NAME})|\[(?P<index>[0-9]{{1,9}})\]")
_PAYLOAD_PATH = re.compile(rf"{_NAME}(?:\.{_NAME}|\[[0-9]{{1,9}}\])*")
# The rest of the expression is the name: a parameter may be called `hub.mode` or `ids[0]`.
_NAMED_VALUE = re.compile(r"(?P<head>headers|query)\.(?P<name>[\w$@:/.\[\]-]+)")

_ALONE: Final = frozenset({"path", "now"})


class TemplateError(ValueError):
    """A malformed template. `position` counts characters from 0; the message counts from 1."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(f"{message} (at character {position + 1})")
        self.position = position


class HookRequest(msgspec.Struct, frozen=True):
    """What templates, and every other decision, see of a request.

    `payload` is any JSON value; `path` is the one below the base path, without outer slashes; `uid`
    is the request's own, and random. `all_headers` are by lower-case name; what decides sees those
    alone that carry no credential: see `visible_headers`, and there for `hidden`.
    """

    path: str
    payload: Any
    now: datetime
    uid: UUID
    all_headers: Mapping[str, str] = msgspec.field(default_factory=dict)
    query: Mapping[str, str] = msgspec.field(default_factory=dict)
    hidden: Collection[str] = frozenset()

    def header(self, name: str) -> str | None:
        """Return the header of that name in lower case, unless it carries a credential."""
        return self.all_headers.get(name) if _is_visible(name, self.hidden) else None

    @property
    def headers(self) -> dict[str, str]:
        """The headers that carry no credential."""
        return visible_headers(self.all_headers, self.hidden)


def visible_headers(
    headers: Mapping[str, str], hidden: Collection[str] = frozenset()
) -> dict[str, str]:
    """Return headers by lower-case name, without those that carry a credential.

    Which do is told by their names; `hidden` are further ones, in lower case.
    """
    return {
        name.lower(): value for name, value in headers.items() if _is_visible(name.lower(), hidden)
    }


def _is_visible(name: str, hidden: Collection[str]) -> bool:
    return not carries_credential(name) and name not in hidden


@lru_cache(maxsize=1024)
def carries_credential(name: str) -> bool:
    """Whether the name of a header or parameter says that it proves who sent the request."""
    return bool(_CREDENTIAL_NAME.search(name))


@dataclass(frozen=True, slots=True)
class Expression:
    """One `{{…}}`: where its value comes from, and the steps that lead to it."""

    written: str
    head: str
    steps: tuple[str | int, ...] = ()

    def value(self, request: HookRequest) -> Any:
        """Return the JSON value meant, or None when the request has none."""
        match self.head:
            case "headers":
                return request.header(str(self.steps[0]).lower())
            case "query":
                return request.query.get(str(self.steps[0]))
            case "path":
                return request.path
            case "now":
                return request.now.astimezone(UTC).isoformat(timespec="seconds")[:-6] + "Z"
            case _:
                return _walk(request.payload, self.steps)

    def render(self, request: HookRequest) -> str:
        """Return the value as text."""
        return _as_text(self.value(request))


def _walk(value: Any, steps: tuple[str | int, ...]) -> Any:
    for step in steps:
        if isinstance(step, str):
            value = value.get(step) if isinstance(value, dict) else None
        else:
            value = value[step] if isinstance(value, list) and step < len(value) else None
    return value


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return msgspec.json.encode(value).decode()


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template: literal text and expressions, in order."""

    parts: tuple[str | Expression, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Template:
        """Return the template that `text` writes. Raises TemplateError."""
        parts: list[str | Expression] = []
        end = 0
        while (start := text.find("{{", end)) >= 0:
            closing = text.find("}}", start + 2)
            if closing < 0:
                raise TemplateError("{{ is never closed by }}", start)
            if start > end:
                parts.append(text[end:start])
            parts.append(_parse_expression(text[start + 2 : closing].strip(), start))
            end = closing + 2
        if end < len(text):
            parts.append(text[end:])
        return cls(tuple(parts))

    @property
    def expressions(self) -> tuple[Expression, ...]:
        """The expressions, in order; none makes the template a fixed text."""
        return tuple(part for part in self.parts if isinstance(part, Expression))

    def render(self, request: HookRequest) -> str:
        """Return the text for this request.

        Raises RecursionError for a payload that is nested deeper than it can be written.
        """
        return "".join(
            part if isinstance(part, str) else part.render(request) for part in self.parts
        )


EMPTY: Final = Template()


def _parse_expression(written: str, position: int) -> Expression:
    if named := _NAMED_VALUE.fullmatch(written):
        return Expression(written, named["head"], (named["name"],))
    if written in _ALONE:
        return Expression(written, written)
    if _PAYLOAD_PATH.fullmatch(written):
        steps = tuple(
            step["name"] if step["name"] is not None else int(step["index"])
            for step in _PAYLOAD_STEP.finditer(written)
        )
        if steps[0] == "payload":
            return Expression(written, "payload", steps[1:])
        if steps[0] not in {"headers", "query", *_ALONE}:
            return Expression(written, "payload", steps)
    raise TemplateError(
        f"{{{{{written[:60]}}}}} names no value; write for example {{{{payload.a.b}}}}, "
        "{{messages[0].subject}}, {{headers.x-event}}, {{query.kind}}, {{path}} or {{now}}",
        position,
    )
